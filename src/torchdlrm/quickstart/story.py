"""Compares ways to have a model every day: one that lives, one retrained on all past days, one left as it is.

In: logs in the order of time, schema, config.  Out: how well the models of each day predicted its log, from which none
of them had learnt; a table and a page about it.  What is done is kept in a folder: the same call resumes.

| model of a day | has learnt | made by |
| --- | --- | --- |
| live, of one or several settings | all days before, one after the other | `advance` with the day before |
| scratch | all days before, shuffled | `preprocess`, `train` and `export` of them all |
| frozen | the history | the first model from scratch |

The first logs are the history, which a model learns together before its first day.
"""

import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path

from torchdlrm.config import Config
from torchdlrm.exporting.export import export
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.schema_file import with_split
from torchdlrm.files import write_atomically
from torchdlrm.html import COLOURS, Chart, Part, render, short, ticks
from torchdlrm.live.advance import advance
from torchdlrm.live.model import LiveModel
from torchdlrm.live.record import read_times
from torchdlrm.live.settings import GateSettings, LiveSettings
from torchdlrm.prediction.files import predict_file
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.prediction.rows_in import RowsIn
from torchdlrm.preprocessing.options import PreprocessOptions
from torchdlrm.preprocessing.preprocess import preprocess
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.training.job import train

_MODELS = (
    "Every model predicts a day before any learns from it. The frozen model stays as it was before the first day, the "
    "live model learns one day after the other, and the model from scratch is trained every day on all days before."
)
_ATTAINABLE = "Attainable is the AUC of the probabilities that the clicks were drawn with."
LIVE, SCRATCH, FROZEN, ATTAINABLE = "live", "scratch", "frozen", "attainable"
# The runs of a live model continue each other: with a rate that decays in each of them it learns less.
CONSTANT_RATE = {"schedule.decay_start_step": "0", "schedule.decay_steps": "0"}
_OPEN_GATE = GateSettings(max_logloss_increase=1e9, calibration=(0.0, 1e9))


@dataclass(frozen=True)
class DayScore:
    """How a model predicted a day.

    Attributes:
        auc: of the day's rows; NaN where they have one label.
        logloss: in nats.
        seconds: to make the model of the one of the day before, or from scratch, and to predict the day. Of the first
            model, which all have, and of the frozen one the prediction alone.
        num_embeddings: rows of all its tables.
    """

    auc: float
    logloss: float
    seconds: float
    num_embeddings: int


@dataclass(frozen=True)
class Comparison:
    """How the models of all days predicted them.

    Attributes:
        days: their names.
        scores: of each kind of model by its name, day by day.
        attainable: AUC of a model that knows the true probabilities, day by day; empty where they are not known.
    """

    days: list[str]
    scores: dict[str, list[DayScore]]
    attainable: list[float]

    def mean_auc(self, name: str) -> float:
        """The mean AUC of the days, of a kind of model or of what is attainable."""
        return statistics.fmean(self._aucs[name])

    def seconds(self, name: str) -> float:
        """What all models of a kind took."""
        return sum(score.seconds for score in self.scores[name])

    def result(self) -> str:
        """In one sentence: what the first live model gains, and what it costs."""
        live = next(name for name in self.scores if name not in {FROZEN, SCRATCH})
        gains = []
        for name in (FROZEN, SCRATCH):
            gain = self.mean_auc(live) - self.mean_auc(name)
            gains.append(f"{abs(gain):.3f} AUC {'above' if gain >= 0 else 'below'} {name}")
        percent = 100 * self.seconds(live) / self.seconds(SCRATCH)
        sentence = f"{live} is {' and '.join(gains)}, at {percent:.0f} % of the time of retraining from {SCRATCH}."
        return sentence[0].upper() + sentence[1:]

    def rows(self) -> list[dict[str, str]]:
        """A table: a row for each kind of model, and for what is attainable."""
        rows = []
        for name, aucs in self._aucs.items():
            means = {"mean AUC": self.mean_auc(name), "first day": aucs[0], "last day": aucs[-1]}
            row = {"model": name, **{caption: f"{auc:.4f}" for caption, auc in means.items()}}
            scores = self.scores.get(name)
            row["logloss"] = f"{statistics.fmean(score.logloss for score in scores):.4f}" if scores else ""
            row["seconds"] = f"{self.seconds(name):.1f}" if scores else ""
            row["table rows"] = f"{scores[-1].num_embeddings:,}" if scores else ""
            rows.append(row)
        return rows

    def as_dict(self) -> dict[str, object]:
        """The comparison as JSON has it, with the means."""
        means = {name: {"mean_auc": self.mean_auc(name), "seconds": self.seconds(name)} for name in self.scores}
        return asdict(self) | {"models": means}

    def page(self, title: str) -> str:
        """A page of HTML with the AUC by day as a chart, and the tables."""
        aucs = self._aucs
        values = ticks(min(map(min, aucs.values())), max(map(max, aucs.values())))
        chart = Chart((-0.3, len(self.days) - 0.7), (values[0], values[-1]), 760, 320, "AUC by day", "day")
        chart.y_axis(short)
        for x, day in enumerate(self.days):
            chart.x_label(x, day)
        for colour, (name, curve) in zip(cycle(COLOURS), aucs.items()):
            chart.curve(list(enumerate(curve)), colour, name, lambda x, y: f"{y:.4f}, {self.days[round(x)]}")
        by_day = [
            {"day": day, **{name: f"{curve[x]:.4f}" for name, curve in aucs.items()}} for x, day in enumerate(self.days)
        ]
        text = [_MODELS, *[_ATTAINABLE] * bool(self.attainable)]
        parts = [Part(text=text, charts=[chart]), Part("All days", rows=self.rows()), Part("By day", rows=by_day)]
        return render(title, parts, lead=self.result())

    @property
    def _aucs(self) -> dict[str, list[float]]:
        known = {ATTAINABLE: self.attainable} if self.attainable else {}
        return known | {name: [score.auc for score in scores] for name, scores in self.scores.items()}


def compare_models(
    folder: str | Path,
    logs: Sequence[Path],
    *,
    schema: FeatureSchema,
    config: Config,
    history_logs: int = 1,
    live: Mapping[str, LiveSettings] = {LIVE: LiveSettings()},
    attainable: Sequence[float] = (),
    progress: ProgressListener = SILENT,
) -> Comparison:
    """Let the models of each day predict it, all in this process.

    Args:
        folder: keeps what is done, so that the same call resumes; it is made where it is not there.
        logs: in the order of time.
        schema: of the logs.
        config: what all models are trained with.
        history_logs: how many of the logs are learnt before the first day.
        live: settings of live models by their names; but every model is taken, good or not. The other models hold back
            as many rows as the first live one, and have its `min_count`.
        attainable: AUC of each day, where it is known.
        progress: receives every model that has predicted its day.

    Raises:
        TorchDLRMError: as preprocessing, training and export do.
    """
    assert 0 < history_logs < len(logs)
    story = _Story(Path(folder), logs, schema, config, history_logs, next(iter(live.values())))
    models: dict[str, Callable[[int], DayScore]] = {FROZEN: story.frozen}
    models |= {name: partial(story.live, name, settings) for name, settings in live.items()}
    models[SCRATCH] = story.scratch
    comparison = Comparison([], {name: [] for name in models}, list(attainable))
    progress.start_phase("learn, then predict the next day", (len(logs) - history_logs) * len(models), unit="models")
    for day in range(history_logs, len(logs)):
        comparison.days.append(logs[day].name.partition(".")[0].replace("_", " "))
        for name, model in models.items():
            comparison.scores[name].append(story.kept(name, day, model))
            progress.advance(1)
        aucs = {name: values[-1].auc for name, values in comparison.scores.items()}
        if attainable:
            aucs[ATTAINABLE] = attainable[day - history_logs]
        progress.note(f"{comparison.days[-1]}: AUC " + ", ".join(f"{name} {auc:.4f}" for name, auc in aucs.items()))
    return comparison


@dataclass(frozen=True)
class _Story:
    """The folder of a comparison. Days are numbered as the logs are, from 0."""

    folder: Path
    logs: Sequence[Path]
    schema: FeatureSchema
    config: Config
    history_logs: int
    settings: LiveSettings

    def kept(self, name: str, day: int, model: Callable[[int], DayScore]) -> DayScore:
        """A score that is in the folder already, or a new one."""
        path = self.folder / "scores" / f"{name}-{day:04d}.json"
        if path.exists():
            return DayScore(**json.loads(path.read_text(encoding="utf-8")))
        score = model(day)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(score)) + "\n")
        return score

    def frozen(self, day: int) -> DayScore:
        """The model of the history predicts a day."""
        return self._predict(self._learn(self.history_logs), day)

    def scratch(self, day: int) -> DayScore:
        """A model that learns all logs before a day predicts it."""
        started_s = time.monotonic()
        score = self._predict(self._learn(day), day)
        if day != self.history_logs:
            shutil.rmtree(self._path(day))
        return replace(score, seconds=time.monotonic() - started_s)

    def _path(self, num_logs: int) -> Path:
        return self.folder / "scratch" / f"{num_logs:04d}"

    def _learn(self, num_logs: int) -> Path:
        """The bundle of a model that has learnt the first logs."""
        path = self._path(num_logs)
        encoded, run, bundle = path / "dataset", path / "run", path / "bundle"
        if bundle.exists():
            return bundle
        path.mkdir(parents=True, exist_ok=True)
        schema = with_split(self.schema, "random", self.settings.hold_back, 0.0)
        options = PreprocessOptions(min_count=self.settings.min_count)
        dataset = preprocess(self.logs[:num_logs], encoded, schema, options, progress=False)
        train(self.config, dataset, run, progress=False)
        export(run, bundle, options=ExportOptions(checkpoint="last"), progress=False)
        return bundle

    def _predict(self, bundle: Path, day: int) -> DayScore:
        started_s = time.monotonic()
        predictor = Predictor.open(bundle)
        out = self.folder / "predictions.parquet"
        metrics = predict_file(predictor, RowsIn([self.logs[day]], predictor.schema), out).metrics
        assert metrics is not None, "every log that a model can learn has labels"
        out.unlink()
        num_embeddings = sum(record.num_embeddings for record in predictor.bundle.manifest.sparse.values())
        return DayScore(metrics.auc, metrics.logloss, time.monotonic() - started_s, num_embeddings)

    def live(self, name: str, settings: LiveSettings, day: int) -> DayScore:
        """The live model of a day predicts it, and learns from it."""
        live, settings = LiveModel(self.folder / name), settings.model_copy(update={"gate": _OPEN_GATE})
        now = day - self.history_logs + 2
        for period in range(len(live.periods) + 1, now + 1):
            end = self.history_logs + period - 1
            logs = self.logs[: self.history_logs] if period == 1 else self.logs[end - 1 : end]
            advance(live.path, logs, config=self.config, schema=self.schema, settings=settings)
        before, record = live.periods[now - 2 : now]
        assert record.progressive is not None, "only the first period has none"
        metrics = record.progressive.all
        learning = read_times(live.day(now - 1)) if now > 2 else {}
        seconds = sum(step.seconds for name, step in learning.items() if name != "score")
        seconds += read_times(live.day(now))["score"].seconds
        num_embeddings = sum(feature.num_embeddings for feature in before.features.values())
        return DayScore(_or_nan(metrics["auc"]), _or_nan(metrics["logloss"]), seconds, num_embeddings)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
