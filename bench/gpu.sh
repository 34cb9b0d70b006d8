#!/usr/bin/env bash
# On a machine with a GPU: builds in place, tests, checks memory accesses and measures, in under 8 minutes.
# Usage: bench/gpu.sh [OUT_FOLDER [map | serve | share | decode | kernels | generate | endure | llm | all]]. After the
# folder, another job instead, for as long again: `map` measures the mapper; `serve` serves a trace on one GPU and on all
# of them; `share` tests and measures sharing; `decode` tests kernels and decode steps; `kernels` and `generate` measure
# these; `endure` long generations and many calls; `llm` measures the engine, and between its two processes the command
# PEER another one, on the requests in nano.jsonl of the folder, which leaves JSON lines in its peer.json. `all` runs
# every test at once, on a machine of two or four GPUs.
# Jobs that SKIP names are left out.
set -u -o pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
out=${1:-bench/results}
mkdir -p "$out"
failed=0
run() { # a name, then a command: keeps going, remembers failure, shows the end of what it printed
  local name=$1 start=$SECONDS
  shift
  [[ " ${SKIP:-} " != *" $name "* ]] || return 0
  if "$@" >"$out/$name.log" 2>&1; then echo "ok   $name ($((SECONDS - start)) s): $(tail -n 1 "$out/$name.log")"; else
    failed=1
    echo "FAIL $name ($((SECONDS - start)) s)"
    tail -n "${TAIL:-40}" "$out/$name.log" | cut -c1-300
    return 1
  fi
}
pytest="python3 -m pytest -q -p no:benchmark -m 'not model'"
gpu="python3 -m pytest -q -p no:benchmark -m 'gpu and not model'"
host="python3 -m pytest -q -p no:benchmark -m 'not gpu and not model'"
steps=(tests/test_{decode,capture,idle,ahead,compiled,halves,padding,prompt,scales,verify}.py)
engine=(tests/test_{engine,engine_exact,preemption,llm,sampler}.py)
run build python3 setup.py build_ext --inplace
others=$(printf -- '--ignore %s ' tests/test_hf_exact.py tests/test_kernels.py tests/test_architectures.py "${steps[@]}" "${engine[@]}")
# The contract provokes refusals on purpose, and one test a fault in a process of its own.
memcheck() { # a name, and the tests
  run "$1" timeout 280 compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 \
    bash -c "$gpu tests -k '($2) and not is_a_fault'"
}
of_models="llama-gqa-sdpa-greedy or mistral-sdpa-beams"
if [ "${2:-}" = all ]; then
  # What watches a device's memory has one for itself: all but the second, where there are four.
  last=$(($(nvidia-smi -L | wc -l) - 1))
  third=$((last > 2 ? 2 : last))
  on() { # the devices that are seen, then what to run
    CUDA_VISIBLE_DEVICES=$1 "${@:2}" &
  }
  on 0 run core timeout 540 bash -c "$gpu tests $others"
  on 1 run trials timeout 400 python3 bench/verification.py --device cuda --only trials --workers 8 --out "$out"
  on 1 run flex timeout 540 bash -c "$gpu tests/test_kernels.py -k flex -n 6"
  on 1 run flashinfer timeout 540 bash -c "$gpu tests/test_kernels.py -k flashinfer -n 12"
  on 1 run kernels timeout 540 bash -c "$gpu tests/test_kernels.py -k 'not flex and not flashinfer' -n 4"
  on 1 run exact timeout 540 bash -c "$gpu tests/test_hf_exact.py -n 6"
  on 1 run decode timeout 540 bash -c "$gpu ${steps[*]} -n 16"
  on 1 run engine timeout 540 bash -c "$gpu ${engine[*]} -n 6"
  on 1 run architectures timeout 120 bash -c "$gpu tests/test_architectures.py --tables $out"
  on $last memcheck sanitizer "test_arena$( ((last > 2)) || echo ' and not alone')"
  {
    CUDA_VISIBLE_DEVICES=$((last > 2)),$third run devices timeout 200 bash -c "$pytest tests -k two_devices"
    CUDA_VISIBLE_DEVICES=$third memcheck sanitizer_of_models "test_cache or contract or swap or $of_models"
    exit $failed
  } &
  on "" run host timeout 400 bash -c "$host tests $others -n 12"
  for job in $(jobs -p); do wait "$job" || failed=1; done
  exit $failed
fi
if [ "${2:-}" = map ]; then
  run map timeout 540 python3 bench/map.py --device cuda --out "$out"
  exit $failed
fi
if [ "${2:-}" = serve ]; then
  run serve timeout 500 python3 bench/serve.py --out "$out"
  exit $failed
fi
if [ "${2:-}" = decode ]; then
  # A kernel that faults ends its process: one for each.
  for kernel in fa2 fa3 flashinfer flex sdpa reference; do
    run "kernel_$kernel" timeout 300 bash -c "$pytest tests/test_kernels.py -m gpu -k $kernel" &
  done
  for job in $(jobs -p); do wait "$job" || failed=1; done
  run decode timeout 240 bash -c "$pytest ${steps[*]} -m gpu -n 8"
  run architectures timeout 120 bash -c "$pytest tests/test_architectures.py -m gpu --tables $out"
  exit $failed
fi
if [ "${2:-}" = kernels ]; then
  run kernels timeout 440 python3 bench/attention.py --device cuda --out "$out"
  exit $failed
fi
if [ "${2:-}" = generate ]; then
  run generate timeout 450 python3 bench/generate.py --out "$out"
  exit $failed
fi
if [ "${2:-}" = endure ]; then
  run endurance timeout 420 python3 bench/endurance.py --out "$out"
  exit $failed
fi
if [ "${2:-}" = llm ]; then
  run requests python3 bench/throughput.py --write "$out"
  run throughput python3 bench/throughput.py --cold --max-model-len 4096 --parts ready host throughput --out "$out"
  if [ -n "${PEER:-}" ]; then
    run peer env -u PYTHONPATH OUT="$out" bash -c "$PEER"
  fi
  run one_request python3 bench/throughput.py --parts ready latency --out "$out"
  [ ! -s "$out/peer.json" ] || run merged python3 bench/throughput.py --parts --vllm "$out/peer.json" --out "$out"
  exit $failed
fi
if [ "${2:-}" = share ]; then
  run tests timeout 180 bash -c "$pytest tests -m gpu -k 'sharing or prefix or swap or export or contract or stateful'"
  run exact timeout 180 bash -c "$pytest tests/test_hf_exact.py -n 8 -k 'cuda and (beam or copied or repeat or return)'"
  run sharing timeout 300 python3 bench/sharing.py --device cuda --out "$out"
  exit $failed
fi
run core timeout 240 bash -c "$gpu tests $others"
run host timeout 240 bash -c "$host tests $others -n 12"
run exact timeout 240 bash -c "$gpu tests/test_hf_exact.py -n 8"
memcheck sanitizer "test_arena or test_cache or contract or $of_models"
run latency timeout 120 python3 bench/latency.py --device cuda --out "$out"
run memory timeout 300 python3 bench/memory.py --device cuda --out "$out"
run memory_at_once timeout 120 python3 bench/memory.py --device cuda --at-once --out "$out"
exit $failed
