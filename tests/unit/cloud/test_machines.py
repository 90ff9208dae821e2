"""Prices: asked of AWS where it answers, else from the package's table."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from botocore.stub import ANY, Stubber

from job.cloud.machines import (
    Needs,
    Prices,
    cost_guess,
    gpu_bytes_at_least,
    hours_guessed,
    machines,
)
from job.config import config_from_yaml, load_config, preset_names
from job.models.discriminator import Discriminator, discriminator_input
from job.models.generator import Architecture, Generator

Stub = Callable[[str], Stubber]
ZONE = "us-east-1a"
NOON = datetime.datetime(2026, 11, 26, 12, tzinfo=datetime.UTC).timestamp()
HOUR = 3600.0


def listed(price: str) -> dict[str, Any]:
    """As the Price List API answers."""
    dimension = {"x.y.z": {"unit": "Hrs", "pricePerUnit": {"USD": price}}}
    offer = {"terms": {"OnDemand": {"x.y": {"priceDimensions": dimension}}}}
    return {"PriceList": [json.dumps(offer)]}


def changes(*found: tuple[float, str]) -> dict[str, Any]:
    """As DescribeSpotPriceHistory answers: newest first."""
    return {
        "SpotPriceHistory": [
            {
                "AvailabilityZone": ZONE,
                "InstanceType": "g5.xlarge",
                "SpotPrice": price,
                "Timestamp": datetime.datetime.fromtimestamp(at, datetime.UTC),
            }
            for at, price in sorted(found, reverse=True)
        ]
    }


def test_the_table_is_as_aws_names_things() -> None:
    assert machines()["g5.12xlarge"].gpus == 4
    for machine in machines().values():
        assert machine.usd > 0.4
        assert machine.memory_gib >= 4 * machine.vcpus
        assert machine.gpus in (1, 4, 8)


def test_the_price_on_demand_is_asked_of_aws_once(stub: Stub) -> None:
    stub("pricing").add_response(
        "get_products", listed("1.2345"), {"ServiceCode": "AmazonEC2", "Filters": ANY}
    )
    prices = Prices()
    assert prices.on_demand("g5.xlarge", "eu-west-1b") == 1.2345
    assert prices.on_demand("g5.xlarge", "eu-west-1c") == 1.2345
    assert not prices.notes


def test_where_aws_does_not_answer_the_table_does_and_says_so(stub: Stub) -> None:
    stub("pricing").add_client_error("get_products", "AccessDeniedException")
    stub("pricing").add_response("get_products", {"PriceList": []})
    prices = Prices()
    assert prices.on_demand("g5.xlarge", ZONE) == 1.006
    assert prices.on_demand("p9.huge", ZONE) is None
    assert [note.partition(" are ")[0] for note in prices.notes] == [
        "on-demand prices",
        "what a p9.huge costs is not known",
    ]


@pytest.mark.parametrize(
    ("found", "mean"),
    [
        ([(-9 * HOUR, "0.40")], 0.40),
        ([(-9 * HOUR, "0.40"), (HOUR, "0.60")], 0.50),
        ([(-9 * HOUR, "0.40"), (0.5 * HOUR, "0.80"), (1.5 * HOUR, "0.40")], 0.60),
        ([(0.5 * HOUR, "0.40")], 0.40),
    ],
)
def test_the_spot_price_is_the_mean_over_the_time(
    stub: Stub, found: list[tuple[float, str]], mean: float
) -> None:
    stub("ec2").add_response(
        "describe_spot_price_history",
        changes(*((NOON + after, price) for after, price in found)),
        {
            "InstanceTypes": ["g5.xlarge"],
            "AvailabilityZone": ZONE,
            "ProductDescriptions": ["Linux/UNIX"],
            "StartTime": datetime.datetime.fromtimestamp(NOON, datetime.UTC),
            "EndTime": datetime.datetime.fromtimestamp(NOON + 2 * HOUR, datetime.UTC),
        },
    )
    prices = Prices()
    assert prices.spot("g5.xlarge", ZONE, NOON, NOON + 2 * HOUR) == pytest.approx(mean)
    assert not prices.notes


def test_spot_prices_that_nobody_tells_are_not_known(stub: Stub) -> None:
    stub("ec2").add_client_error("describe_spot_price_history", "UnauthorizedOperation")
    stub("ec2").add_response("describe_spot_price_history", {"SpotPriceHistory": []})
    prices = Prices()
    assert prices.spot("g5.xlarge", ZONE, NOON, NOON + HOUR) is None
    assert prices.spot("g5.xlarge", ZONE, NOON, NOON + HOUR) is None
    notes = list(prices.notes)
    assert notes[0].startswith("spot prices are not known (cannot look up spot prices: access")
    assert notes[1] == "AWS keeps spot prices for 90 days; some are gone"


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_has_a_guess(preset: str) -> None:
    low, high = hours_guessed(load_config(preset), machines()["g5.xlarge"], 1)
    assert 0 < low < high


def test_a_gpu_that_is_fast_in_float16_alone_is_slow_in_float32() -> None:
    def hours(machine: str, precision: str) -> float:
        config = load_config("guide", {"train.precision": precision})
        return hours_guessed(config, machines()[machine], 1)[0]

    assert hours("g4dn.xlarge", "fp32") == pytest.approx(hours("g4dn.xlarge", "auto") * 65 / 8.1)
    assert hours("g4dn.xlarge", "fp16") == hours("g4dn.xlarge", "auto")
    assert hours("g6.xlarge", "fp32") == hours("g6.xlarge", "auto")


def test_the_guess_goes_with_the_arithmetic() -> None:
    config = load_config("guide")
    machine = machines()["g5.12xlarge"]
    low, _ = hours_guessed(config, machine, 1)
    assert hours_guessed(config, machine, 4)[0] == pytest.approx(low / 4)
    half = config_from_yaml(config.to_yaml(), source="x", overrides={"train.supervised_only": True})
    assert hours_guessed(half, machine, 1)[0] == pytest.approx(low / 2)
    # 16 labeled and 16 unlabeled images of 321 x 321, 4.38 MFLOP a pixel and 6 % for D, 50,000
    # times, at half of 35 TFLOP/s.
    assert low == pytest.approx(32 * 321**2 * 4.380e6 * 1.06 * 50_000 / 17.5e12 / 3600)


def test_the_table_of_costs_has_a_line_for_each_gpu_that_fits() -> None:
    config = load_config("guide")
    lines = cost_guess([config], Needs(1, 4, 14_000))
    assert [line.split()[0] for line in lines[2:]] == [
        *("g4dn.xlarge", "g6.xlarge", "g5.xlarge", "g6e.xlarge", "p4d.24xlarge", "p5.48xlarge")
    ]
    four = cost_guess([config] * 3, Needs(4, 16, 56_000))
    assert "all 3 runs" in four[0]
    assert [line.split()[0] for line in four[2:5]] == [
        "g4dn.12xlarge",
        "g6.12xlarge",
        "g5.12xlarge",
    ]


def test_several_machines_cost_as_much_as_one_that_takes_longer() -> None:
    config = load_config("guide")
    one, two = (cost_guess([config], Needs(1, 4, 14_000, nodes))[2].split() for nodes in (1, 2))
    assert float(two[2]) == pytest.approx(2 * float(one[2]), abs=0.02)
    assert float(two[3]) == pytest.approx(float(one[3]) / 2, rel=0.1)  # hours
    assert two[6:9] == one[6:9]  # dollars
    assert two[-1] == "-"  # not on spot


def test_what_does_not_fit_is_not_in_the_table_of_costs() -> None:
    config = load_config("guide")
    kinds = [
        [
            line.split()[1]
            for line in cost_guess([config], Needs(1, 4, 1, gpu_bytes=gib * 2**30))[2:]
        ]
        for gib in (10, 20, 60, 90)
    ]
    assert kinds == [
        ["T4", "L4", "A10G", "L40S", "A100", "H100"],
        ["L4", "A10G", "L40S", "A100", "H100"],
        ["H100"],
        ["machine"],  # none is large enough
    ]


@pytest.mark.parametrize(
    ("backbone", "head", "stride"),
    [
        ("tiny", "deeplabv2", 8),
        ("resnet18", "deeplabv2", 8),
        ("resnet50", "deeplabv2", 16),
        ("resnet18", "deeplabv3plus", 16),
    ],
)
def test_the_memory_foreseen_is_what_torch_keeps(backbone: str, head: str, stride: int) -> None:
    """The tensors that one batch of unlabeled images keeps until the gradients are there."""
    config = config_from_yaml(
        load_config("guide").to_yaml(),
        source="x",
        overrides={
            "model.backbone": backbone,
            "model.head": head,
            "model.output_stride": stride,
            "data.crop_size": 97,
            "train.batch_size": 2,
        },
    )
    generator = Generator(Architecture.of(config.model, 21)).train()
    discriminator = Discriminator(21, 64).train()
    images, valid = torch.rand(2, 3, 97, 97), torch.ones(2, 97, 97, dtype=torch.bool)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = generator(images)
        discriminator(discriminator_input(logits.softmax(dim=1), images, valid))
    parameters = {p.data_ptr() for p in (*generator.parameters(), *discriminator.parameters())}
    activations = sum(one.nbytes() for start, one in kept.items() if start not in parameters)
    foreseen = gpu_bytes_at_least(config) - 12 * sum(p.numel() for p in generator.parameters())
    assert activations == pytest.approx(foreseen, rel=0.25)


def test_a_small_run_costs_next_to_nothing_and_the_table_stays_one() -> None:
    lines = cost_guess([load_config("demo")], Needs(1, 4, 14_000))
    assert {len(line) for line in lines[2:]} == {len(lines[1])}
    assert "< 0.01" in lines[2]
