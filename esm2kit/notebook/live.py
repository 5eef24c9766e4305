"""Live view of a training run: curves that update while it runs, and a button that stops it with a checkpoint.

The curves come from metrics.csv of the worker that training/launch.py starts; the button sends it SIGTERM.
Without a front end the log lines of the worker are printed instead.
"""

import contextlib
import signal
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets
from IPython.display import HTML, display

from esm2kit.core.errors import InputError
from esm2kit.core.processes import stop_group
from esm2kit.notebook.widgets import INK, LINE, QUIET, format_card, has_front_end, keep_responsive
from esm2kit.training import launch
from esm2kit.training.metrics_log import read_metrics

SECONDS_BETWEEN_REDRAWS = 1.0
MAX_POINTS = 400
# readable on white paper and on JupyterLab's dark one
BLUE, ORANGE = "#1b80c4", "#c77700"
NOISE_PREFIXES = ("{", "Initializing distributed", "distributed_backend", "All distributed processes")
# an outline in the page colour keeps text readable on top of a curve
HALO = 'paint-order="stroke" stroke="var(--jp-layout-color0, #fff)" stroke-width="3" stroke-linejoin="round"'
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 340, 170, 52, 26, 22


class Curve(NamedTuple):
    """Name, points and colour of one line of a chart."""

    name: str
    points: list[tuple[float, float]]
    colour: str
    dots: bool = False


def train(
    stage: str, config: Any, guide_loss: float | None = None, overwrite: bool = False, name: str = ""
) -> dict[str, Any]:
    """Run a training stage until it ends or the Stop button is pressed, and show its progress.

    A run with the same settings is resumed. A run with other settings is an error, or is overwritten.

    Args:
        stage: pretrain or finetune.
        config: the stage's config dataclass.
        guide_loss: loss to plot as a horizontal line, such as that of the unigram guess, in nats.
        overwrite: start over if the folder holds a run with other settings; its files are lost.
        name: prefix of each log line, for cells that train more than once.

    Returns:
        The content of `<out_dir>/<stage>.json`; after a stop, the state so far.

    Raises:
        InputError: raised by `launch.train`; with code `resume.another-run`, the message names the parameters of the
            notebook. Or the run was stopped before its first update, before its
            first validation, or while its report was written.
    """
    try:
        result = _train(stage, config, guide_loss, name)
    except InputError as error:
        if error.code != "resume.another-run":
            raise
        if not overwrite:
            # the original message names command-line options; a notebook has parameters
            raise InputError(
                f"{error.values['path']} belongs to another run: {error.values['changed']}. "
                "Set overwrite to True to start over, or work_dir to another folder.",
                code="resume.another-run",
                **error.values,
            ) from None
        print("the folder holds a run with other settings: starting over")
        result = _train(stage, replace(config, resume_if_exists=False), guide_loss, name)
    _check_scored(result, getattr(config, "max_steps", None))
    return result


def _train(stage: str, config: Any, guide_loss: float | None, name: str) -> dict[str, Any]:
    before = f"{name}: " if name else ""
    if not has_front_end():
        return launch.train(stage, config, lambda line: _print(line, before))
    view = TrainingView(stage, Path(config.out_dir), getattr(config, "max_steps", None), guide_loss)
    shown = display(view.box, display_id=True)
    keep_responsive(view.button)
    try:
        with view.redraw_while_running():
            result = launch.train(stage, config, lambda line: view.show_line(line, before), view.set_worker)
            run = result if "step" in result else result["runs"][-1]
            view.show_line(f"{before}ended at update {run['step']:,}, saved in {Path(config.out_dir).name}")
            return result
    except InputError as error:
        if not (view.stopping and _was_killed_by_stop(error, config.devices)):
            raise
        view.show_line(f"{before}stopped while no update was running")
        raise InputError(
            "training was stopped before its first update or after its last one. What was saved earlier is kept: run "
            "this cell again to continue.",
            code="training.stopped",
            stage=stage,
        ) from None
    finally:
        # replace the widget by a static picture, which a saved notebook keeps
        shown.update(HTML(view.render()))


def _was_killed_by_stop(error: InputError, devices: int) -> bool:
    """Check whether SIGTERM ended the worker before it could handle the signal; torchrun then reports a failure."""
    killed = (-signal.SIGTERM, 128 + signal.SIGTERM)
    return error.code == "worker.failed" and (devices > 1 or error.values["exit_code"] in killed)


def _check_scored(result: dict[str, Any], max_steps: int | None) -> None:
    """Raise InputError if the run was stopped before it has a score; running the cell again resumes it."""
    run = result["runs"][-1] if "runs" in result else result | {"max_steps": max_steps}
    stopped = result.get("finished") is False or ("runs" not in result and result.get("val_loss") is None)
    if stopped and run["step"] < run["max_steps"]:
        when = "" if run["val_loss"] is not None else ", before its first validation"
        raise InputError(
            f"training stopped at update {run['step']:,} of {run['max_steps']:,}{when}, so there is no score to show "
            "yet. The checkpoint was saved: run this cell again to resume.",
            code="training.no-score",
            step=run["step"],
        )


def _print(line: str, before: str) -> None:
    """Print a log line, except torchrun's own lines and the result, which the notebook receives as a dict."""
    if _is_informative(line):
        print(f"{before}{line}", flush=True)


def _is_informative(line: str) -> bool:
    line = line.removeprefix("INFO: ")
    return bool(line.strip("*- ")) and not line.startswith(NOISE_PREFIXES)


class TrainingView:
    """Curves of a run folder's metrics.csv, its last log line, and the Stop button.

    Args:
        stage: pretrain or finetune.
        out_dir: folder of the run.
        max_steps: last update of the run, the end of the horizontal axis. Default: None, not known.
        guide_loss: loss to plot as a horizontal line, in nats.
    """

    def __init__(self, stage: str, out_dir: Path, max_steps: int | None, guide_loss: float | None = None) -> None:
        self.stage, self.out_dir, self.max_steps, self.guide_loss = stage, out_dir, max_steps, guide_loss
        self.worker: subprocess.Popen | None = None
        self.stopping = False
        self.line = "starting"
        self.curves = ipywidgets.HTML()
        self.button = ipywidgets.Button(
            description="Stop and save",
            tooltip="Finish this update, write a checkpoint and stop",
            button_style="warning",
        )
        self.button.on_click(lambda button: self.stop())
        self.box = ipywidgets.VBox([self.button, self.curves])

    def set_worker(self, worker: subprocess.Popen) -> None:
        """Set the worker process that the button stops.

        Args:
            worker: the process, leader of its own process group.
        """
        self.worker = worker
        if self.stopping:  # pressed before there was a process
            self.stop()

    def show_line(self, line: str, before: str = "") -> None:
        """Set the log line to show, if it is informative.

        Args:
            line: a line of the worker's log.
            before: prefix of the line.
        """
        self.line = f"{before}{line}" if _is_informative(line) else self.line

    def stop(self) -> None:
        """Send SIGTERM: the worker finishes its update, saves and exits. Before the first update nothing is lost."""
        self.stopping = self.button.disabled = True
        self.button.description = "Stopping …"
        if self.worker is not None and self.worker.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                stop_group(self.worker)

    @contextlib.contextmanager
    def redraw_while_running(self) -> Any:
        """Update the curves about once per second while the block runs.

        Yields:
            Nothing.
        """
        ended = threading.Event()

        def redraw() -> None:
            while not ended.wait(SECONDS_BETWEEN_REDRAWS):
                self.curves.value = self.render()

        thread = threading.Thread(target=redraw, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.curves.value = self.render()

    def read_rows(self) -> list[dict[str, str]]:
        """Read metrics.csv of the run, or of the seed that is running.

        Returns:
            Column -> text, one dict per row; empty if there is no file yet.
        """
        files = [
            path for path in (self.out_dir / "metrics.csv", *self.out_dir.glob("seed=*/metrics.csv")) if path.exists()
        ]
        return read_metrics(max(files, key=lambda path: path.stat().st_mtime)) if files else []

    def render(self) -> str:
        """Render the curves and the log line as self-contained HTML.

        Returns:
            HTML with one SVG chart per metric.
        """
        rows = self.read_rows()
        # the axis follows the curves up to a fifth of the run, and then shows the complete run
        latest = max((float(row["step"]) for row in rows), default=1.0)
        end = self.max_steps if self.max_steps and latest > 0.2 * self.max_steps else 1.25 * latest
        columns = rows[0] if rows else {}
        metrics = [name for name in columns if name.startswith("val_") and name != "val_loss"][:1]
        metrics += [name for name in columns if name.startswith("downstream_") and name != "downstream_peak_gib"]
        losses = [
            Curve("training loss", extract_points(rows, "train_loss"), BLUE),
            Curve("validation", extract_points(rows, "val_loss"), ORANGE, dots=True),
        ]
        panels = [render_panel(losses, end, self.guide_loss)]
        panels += [
            render_panel([Curve(format_panel_title(name), extract_points(rows, name), ORANGE, dots=True)], end)
            for name in metrics
        ]
        panels.append(render_panel([Curve("learning rate", extract_points(rows, "lr"), BLUE)], end))
        panels.append(render_panel([Curve("tokens/s", extract_points(rows, "tokens_per_s"), BLUE)], end))
        body = f'<div style="display:flex;flex-wrap:wrap;gap:.4em 1em">{"".join(panels)}</div>'
        return format_card(f'<code role="status">{escape(self.line)}</code>{body}')


def format_panel_title(column: str) -> str:
    """Convert a column of metrics.csv into the title of its chart.

    Args:
        column: such as val_accuracy or downstream_accuracy.

    Returns:
        The title.
    """
    return column.replace("val_", "validation ").replace("downstream_", "downstream task, ")


def extract_points(rows: Sequence[dict[str, str]], name: str) -> list[tuple[float, float]]:
    """Extract the points of a column, thinned to screen resolution; the last point is retained.

    Args:
        rows: rows of metrics.csv.
        name: column.

    Returns:
        (update, value) of each row that has a value.
    """
    found = [(float(row["step"]), float(row[name])) for row in rows if row.get(name)]
    every = max(1, len(found) // MAX_POINTS)
    return found[::every] + (found[-1:] if found and (len(found) - 1) % every else [])


def render_panel(curves: Sequence[Curve], end: float, guide: float | None = None) -> str:
    """Render a small line chart as SVG, with the latest values in its title.

    Args:
        curves: the lines.
        end: last update of the horizontal axis.
        guide: value of a horizontal line. Default: none.

    Returns:
        An <svg> element.
    """
    values = [y for curve in curves for _, y in curve.points] + ([guide] if guide is not None else [])
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    low, high = low - margin, high + margin

    def x_of(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * step / max(end, 1)

    def y_of(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    labels, title, marks = [], [], []
    for place, curve in enumerate(curves):
        latest = f" {_format_value(curve.points[-1][1])}" if curve.points else ""
        labels.append(f"{curve.name}{latest or ': none yet'}")
        title.append(f'<tspan fill="{curve.colour}" dx="{8 * (place > 0)}">{escape(curve.name)}</tspan>'
                     f'<tspan fill="{INK}" font-weight="600">{latest}</tspan>')  # fmt: skip
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in curve.points)
        marks.append(f'<polyline points="{path}" fill="none" stroke="{curve.colour}" stroke-width="1.6"/>')
        if curve.dots:
            marks += [
                f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3" fill="{curve.colour}"/>' for x, y in curve.points
            ]
    if guide is not None:
        marks.append(f'<path d="M{LEFT} {y_of(guide):.1f}H{WIDTH - 10}" stroke="{QUIET}" stroke-dasharray="5 4"/>'
                     f'<text x="{LEFT + 4}" y="{y_of(guide) - 4:.1f}" fill="{QUIET}" {HALO}>'
                     f"unigram guess {guide:.2f}</text>")  # fmt: skip
    bottom = HEIGHT - BOTTOM
    ticks = "".join(
        f'<text x="{LEFT - 6}" y="{y_of(value) + 4:.1f}" text-anchor="end" fill="{QUIET}">{_format_value(value)}</text>'
        for value in ((low + margin, high - margin) if values and high - low > 2.5 * margin else values[:1])
    )
    return (
        f'<svg role="img" aria-label="{escape(", ".join(labels))}" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-size="11" font-family="system-ui, sans-serif"><text x="{LEFT}" y="15">{"".join(title)}'
        f'</text><path d="M{LEFT} {TOP}V{bottom}H{WIDTH - 10}" fill="none" stroke="{LINE}"/>{ticks}{"".join(marks)}'
        f'<text x="{LEFT}" y="{HEIGHT - 6}" fill="{QUIET}">0</text><text x="{WIDTH - 10}" y="{HEIGHT - 6}" '
        f'text-anchor="end" fill="{QUIET}">update {end:,.0f}</text></svg>'
    )


def _format_value(value: float) -> str:
    return (
        f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) >= 0.01 or not value else f"{value:.1e}"
    )
