"""The run as a web page, `/ui`: the queue as this server knows it, steps and rollouts as the learner writes them.

The page asks again every two seconds; nothing is kept here for it, and nothing of the run's files is parsed here: what
is sent are their own lines, from the byte on that the page has read up to. So it shows a run in progress, one that has
ended, and, where the learner writes to another machine's disk, the queue alone.
"""

from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Response

from syncline.observe.files import ENGINE_FILE, PROCESSES_FILE, NotALine, Piece, lines_after, lines_before, read_object
from syncline.observe.sinks import METRICS_FILE, ROLLOUTS_FILE
from syncline.observe.summary import SUMMARY_FILE
from syncline.trajectory import atropos_run
from syncline.trajectory.atropos_wire import Registration
from syncline.trajectory.store import TrajectoryStore
from syncline.trajectory.turns import Turns

PIECE_BYTES = 1 << 20
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""The page runs its own script and no other, whatever a rollout says."""
Offset = Annotated[int, Query(ge=0, lt=2**53)]


def add_live_routes(app: FastAPI, store: TrajectoryStore, own: Registration | None) -> None:
    turns: Turns = app.state.turns
    folder = store.path.parent

    @app.get("/ui", include_in_schema=False)
    async def page() -> Response:
        return Response(_packed("live.html"), media_type="text/html", headers=_HEADERS)

    @app.get("/ui/live.js", include_in_schema=False)
    async def script() -> Response:
        return Response(_packed("live.js"), media_type="text/javascript", headers=_HEADERS)

    @app.get("/ui/run")
    async def run() -> dict[str, Any]:
        """What the run is, and which of its processes the supervisor has started and not seen end."""
        trainer = await turns.take(lambda queue: atropos_run.registration(queue, own) or own)
        processes = read_object(folder / PROCESSES_FILE) or {"processes": []}
        return {
            "run_id": store.run_id,
            "num_steps": trainer.num_steps if trainer else None,
            "engine": read_object(folder / ENGINE_FILE),
            "processes": [process["name"] for process in processes["processes"]],
            "summary": read_object(folder / SUMMARY_FILE),
        }

    @app.get("/ui/steps")
    def steps(offset: Offset = 0) -> Response:
        """The metrics of the steps from byte `offset` of their file on."""
        try:
            return _lines(lines_after(folder / METRICS_FILE, offset, max_bytes=PIECE_BYTES))
        except NotALine as error:
            raise HTTPException(409, f"{error}; begin again at 0") from error

    @app.get("/ui/rollouts")
    def rollouts(before: Offset | None = None) -> Response:
        """The newest sample groups, or those before byte `before` of their file."""
        return _lines(lines_before(folder / ROLLOUTS_FILE, before, max_bytes=PIECE_BYTES))


def _lines(piece: Piece) -> Response:
    head = b'{"start":%d,"end":%d,"rows":[' % (piece.start, piece.end)
    return Response(head + b",".join(piece.lines) + b"]}", media_type="application/json")


def _packed(name: str) -> bytes:
    return resources.files("syncline.trajectory").joinpath(name).read_bytes()
