export VATTN_COMMIT=3dae3c359301544b42384a30b7bc67ba7571ba6b
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl; export PYTHONPATH=/tmp/site:$PWD PYTHONUNBUFFERED=1
python3 setup.py build_ext --inplace >/dev/null 2>&1
(timeout 45 python3 -m pytest -q -p no:benchmark -m gpu tests/test_decode.py -k "llama-gqa-sdpa and prompt" --log-level=DEBUG -o log_cli=true 2>&1 | grep -v "torch\.\|Guard\|_dynamo" | grep -n "capture failed" -A60 | cut -c1-160 | tail -70) > $OUT/debug.log 2>&1 &
(timeout 60 python3 -m pytest -q -p no:benchmark -m gpu tests/test_kernels.py -k "cudnn or fa3" 2>&1 | tail -3; timeout 60 python3 -m pytest -q -p no:benchmark -m gpu tests/test_capture.py 2>&1 | tail -4) > $OUT/k.log 2>&1 &
wait
tail -60 $OUT/debug.log; cat $OUT/k.log
timeout 100 python3 bench/sharing.py --device cuda --out $OUT > $OUT/sharing.log 2>&1; tail -12 $OUT/sharing.log
timeout 135 python3 bench/generate.py --points 1x1024 32x8192 16x8192 1x130000 64_mixed --kernels fa2 fa3+compiled --peers dynamic --steps 30 --out $OUT > $OUT/gen.log 2>&1; grep "^{\|^step\|^memory" $OUT/gen.log | cut -c1-250
