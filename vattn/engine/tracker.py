"""``Tracker``: the requests of an engine as their callers see them, by id. No torch."""

from __future__ import annotations

from vattn.engine.outputs import RequestOutput
from vattn.engine.request import Branch, FinishReason, Request
from vattn.engine.table import RequestTable
from vattn.engine.tracked import Tracked


class Tracker:
    """The requests of an engine as their callers see them, from their arrival until their last output is given back."""

    def __init__(self) -> None:
        self._of: dict[str, Tracked] = {}

    def __len__(self) -> int:
        return len(self._of)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._of

    def __getitem__(self, request_id: str) -> Tracked:
        return self._of[request_id]

    def add(self, tracked: Tracked) -> None:
        """Takes a new request."""
        self._of[tracked.request.id] = tracked

    def drop(self, request_id: str) -> None:
        """Forgets a request, if it is there."""
        self._of.pop(request_id, None)

    def stops(self, branch: Branch) -> FinishReason | None:
        """Why an output ends behind its last token. What goes wrong with a request's text ends that request alone."""
        request = branch.request
        try:
            return self._of[request.id].stops(branch)
        except Exception as error:
            request.error = f"{type(error).__name__}: {error}"
            return FinishReason.ERROR

    def output(self, request: Request, requests: RequestTable) -> RequestOutput:
        """What there is of a request. A text that cannot be decoded ends it with an error.

        Args:
            request: that is tracked.
            requests: has it, unless it has ended.
        """
        tracked = self._of[request.id]
        try:
            return tracked.output()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            requests.end(request, FinishReason.ERROR)
            request.error = why
            for branch in request.branches:
                branch.finish_reason = FinishReason.ERROR
            return tracked.output()

    def forget_ended(self, requests: RequestTable, ended: list[Request]) -> None:
        """Forgets requests that have ended, whose outputs were given back."""
        for request in ended:
            self.drop(request.id)
        requests.ended[:] = [each for each in requests.ended if each not in ended]
