"""The machines a job may run on: what fits on them, what they cost, how long a run may take."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from job.cloud.aws import client, explained
from job.config import RESNETS, TIMM, Config
from job.errors import JobError

AWS_SAVES_AT_MOST = 0.9
"""Of the on-demand price. Source: AWS's page "Amazon EC2 Spot Instances Pricing"."""
_USABLE_MEMORY = 0.93
"""Of a machine's; the rest is its system's and the agent's."""
_DISCRIMINATOR_BYTES_PER_PIXEL = 320
"""As in networks.yaml."""
_BYTES_PER_PARAMETER = 12
"""Itself, its gradient and its momentum."""
_DISCRIMINATOR = 1.06
"""What the discriminator adds, by the same count."""
_TEACHER = 1 / 3
"""Of a pass forward and back: forward alone, over the unlabeled images."""
_UTILISATION = (0.1, 0.5)
"""Of a GPU's peak: dilated convolutions at a quarter of the stride reach no more, and an H200 that
waited for its host reached 15%. A guess, which the run's own speed replaces soon."""


@dataclass(frozen=True)
class Needs:
    """What a run asks of each of its machines, and how many of those."""

    gpus: int
    vcpus: int
    memory_mib: int
    nodes: int = 1
    gpu_bytes: float = 0.0
    """Of each GPU; 0 if it is not known."""


@dataclass(frozen=True)
class Machine:
    """An EC2 instance type."""

    name: str
    gpu: str
    gpus: int
    vcpus: int
    memory_gib: int
    usd: float
    """An hour, on demand, Linux, in the table's region."""
    tflops: float
    """Of one GPU, at most, in single precision."""
    tflops_half: float
    """Unless `train.precision` is fp32."""
    gpu_gib: int
    """Memory of one GPU."""

    def holds(self, needs: Needs) -> bool:
        """Whether it is large enough, but for its GPUs' memory."""
        return (
            self.gpus >= needs.gpus
            and self.vcpus >= needs.vcpus
            and self.memory_gib * 1024 * _USABLE_MEMORY >= needs.memory_mib
        )

    def computes(self, needs: Needs) -> bool:
        """Whether the memory of a GPU is large enough, as far as that can be said before."""
        return self.gpu_gib * 2**30 >= needs.gpu_bytes


@functools.cache
def machines() -> dict[str, Machine]:
    """The types of the package's table, by name."""
    raw = _table()
    return {
        name: Machine(
            name=name,
            tflops=raw["tflops"][facts["gpu"]],
            tflops_half=raw["tflops_half"].get(facts["gpu"], raw["tflops"][facts["gpu"]]),
            gpu_gib=raw["gpu_gib"][facts["gpu"]],
            **facts,
        )
        for name, facts in raw["types"].items()
    }


def prices_of() -> str:
    """When and where the table's prices were seen."""
    return f"{_table()['region']}, {_table()['as_of']}"


@functools.cache
def _table() -> dict[str, Any]:
    text = resources.files("job.cloud").joinpath("machines.yaml").read_text(encoding="utf-8")
    raw: dict[str, Any] = yaml.safe_load(text)
    return raw


# ---------------------------------------------------------------- before a run


def hours_guessed(config: Config, machine: Machine, gpus: int) -> tuple[float, float]:
    """How many hours all iterations of a run may take, from and to."""
    height, width = config.data.crop_size
    passes = 1.0
    if not config.train.supervised_only:
        data = config.data
        labels_itself = not (config.train.ema_decay or data.strong_augment or data.cutmix)
        passes += 1 if labels_itself else 1 + _TEACHER
    images = passes * config.train.batch_size * config.train.accumulate
    flop = images * height * width * _network(config).mflop * 1e6 * _DISCRIMINATOR
    tflops = machine.tflops if config.train.precision == "fp32" else machine.tflops_half
    at_peak_s = config.train.iterations * flop / (gpus * tflops * 1e12)
    slow, fast = _UTILISATION
    return at_peak_s / fast / 3600, at_peak_s / slow / 3600


def gpu_bytes_at_least(config: Config) -> float:
    """Memory that training takes of each GPU, at least: without the libraries' own; 0: not known.

    One batch of one stream is there at a time; what is accumulated takes no more.
    """
    height, width = config.data.crop_size
    if config.model.backbone.startswith(TIMM):
        return 0.0
    network = _network(config)
    of_pixel = network.bytes
    if not config.train.supervised_only:
        of_pixel += _DISCRIMINATOR_BYTES_PER_PIXEL
    return (
        config.train.batch_size * height * width * of_pixel
        + network.parameters * 1e6 * _BYTES_PER_PARAMETER
    )


@dataclass(frozen=True)
class _Network:
    """A line of networks.yaml."""

    parameters: float
    mflop: float
    bytes: float


def _network(config: Config) -> _Network:
    """That of the configuration; of timm's, which nobody has measured, the largest of ours."""
    model = config.model
    backbone = RESNETS[-1] if model.backbone.startswith(TIMM) else model.backbone
    return _Network(**_networks()[f"{backbone} {model.head} {model.output_stride}"])


@functools.cache
def _networks() -> dict[str, Any]:
    text = resources.files("job.cloud").joinpath("networks.yaml").read_text(encoding="utf-8")
    raw: dict[str, Any] = yaml.safe_load(text)
    return raw


def cost_guess(configs: Sequence[Config], needs: Needs) -> list[str]:
    """Lines of a table: what the runs may cost on the cheapest machine of each kind that fits.

    Args:
        configs: of the runs.
        needs: of each of them.
    """
    cheapest: dict[str, Machine] = {}
    for machine in sorted(machines().values(), key=lambda machine: machine.usd):
        if machine.holds(needs) and machine.computes(needs):
            cheapest.setdefault(machine.gpu, machine)
    what = "the run" if len(configs) == 1 else f"all {len(configs)} runs"
    lines = [
        f"What {what} may cost (prices of {prices_of()}; the time is a guess from the arithmetic):",
        f"  {'machine':<14} {'GPU':<5} {'$/h':>6} {'hours':>13} {'on demand, $':>15} "
        f"{'spot at -90%, $':>15}",
    ]
    for machine in cheapest.values():
        spans = [hours_guessed(config, machine, needs.gpus * needs.nodes) for config in configs]
        low, high = sum(span[0] for span in spans), sum(span[1] for span in spans)
        hourly = machine.usd * needs.nodes
        spot = hourly * (1 - AWS_SAVES_AT_MOST)
        best = "-" if needs.nodes > 1 else _span(low * spot, high * spot)
        lines.append(
            f"  {machine.name:<14} {machine.gpu:<5} {hourly:>6.2f} "
            f"{_span(low, high):>13} {_span(low * hourly, high * hourly):>15} {best:>15}"
        )
    if not cheapest:
        lines.append("  no machine of the table is large enough")
    return lines


def _span(low: float, high: float) -> str:
    low_text, high_text = _number(low), _number(high)
    return high_text if low_text == high_text else f"{low_text} to {high_text}"


def _number(value: float) -> str:
    if value < 0.01:
        return "< 0.01"
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


# ---------------------------------------------------------------- during and after it


class Prices:
    """What machines cost, asked of AWS where it answers, else from the table."""

    def __init__(self) -> None:
        self.notes: dict[str, None] = {}
        """What was taken instead of an answer, each once."""
        self._on_demand: dict[tuple[str, str], float | None] = {}

    def on_demand(self, machine: str, zone: str) -> float | None:
        """US dollars an hour; None if nobody knows."""
        key = (machine, _region(zone))
        if key not in self._on_demand:
            self._on_demand[key] = self._ask_on_demand(*key)
        return self._on_demand[key]

    def spot(self, machine: str, zone: str, since: float, until: float) -> float | None:
        """US dollars an hour, the mean over a time; None if AWS does not tell.

        Args:
            machine: its type.
            zone: availability zone.
            since: seconds since 1970.
            until: likewise.
        """
        try:
            ec2 = client("ec2", _region(zone))
            with explained("look up spot prices"):
                reply = ec2.describe_spot_price_history(
                    InstanceTypes=[machine],
                    AvailabilityZone=zone,
                    ProductDescriptions=["Linux/UNIX"],
                    StartTime=datetime.datetime.fromtimestamp(since, datetime.UTC),
                    EndTime=datetime.datetime.fromtimestamp(until, datetime.UTC),
                )
        except JobError as error:
            self.notes[f"spot prices are not known ({error.message})"] = None
            return None
        changes = sorted(
            (item["Timestamp"].timestamp(), float(item["SpotPrice"]))
            for item in reply["SpotPriceHistory"]
        )
        if not changes:
            self.notes["AWS keeps spot prices for 90 days; some are gone"] = None
            return None
        return _mean(changes, since, until)

    def _ask_on_demand(self, machine: str, region: str) -> float | None:
        wanted = {
            "instanceType": machine,
            "regionCode": region,
            "operatingSystem": "Linux",
            "tenancy": "Shared",
            "preInstalledSw": "NA",
            "capacitystatus": "Used",
        }
        try:
            pricing = client("pricing", "us-east-1")  # it answers in few regions, for all
            with explained("look up prices"):
                reply = pricing.get_products(
                    ServiceCode="AmazonEC2",
                    Filters=[
                        {"Type": "TERM_MATCH", "Field": field, "Value": value}
                        for field, value in wanted.items()
                    ],
                )
            terms = json.loads(reply["PriceList"][0])["terms"]["OnDemand"]
            (dimension,) = next(iter(terms.values()))["priceDimensions"].values()
            return float(dimension["pricePerUnit"]["USD"])
        except (JobError, LookupError, ValueError, TypeError, AttributeError, StopIteration):
            known = machines().get(machine)
            if known is None:
                self.notes[f"what a {machine} costs is not known"] = None
                return None
            self.notes[f"on-demand prices are those of {prices_of()}"] = None
            return known.usd


def _region(zone: str) -> str:
    """`us-east-1` of `us-east-1a`."""
    return zone.rstrip("abcdefghijklmnopqrstuvwxyz") if zone else ""


def _mean(changes: Sequence[tuple[float, float]], since: float, until: float) -> float:
    """Of a price over a time, from when it changed to what."""
    total = 0.0
    for number, (start, price) in enumerate(changes):
        end = changes[number + 1][0] if number + 1 < len(changes) else until
        # The first one was in force already when the time began.
        begin = since if number == 0 else max(since, start)
        total += price * max(0.0, min(end, until) - begin)
    return total / (until - since) if until > since else changes[-1][1]
