"""Energy and carbon of a run, by hand, by laws, and against published figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from planner.foundation.errors import InputError
from planner.hardware import catalog
from planner.hardware.on_premises import OnPremisesTable, OwnedDevice, with_own
from planner.hardware.prices import on_premises_inputs, shipped_market
from planner.sizing.comparison import Pricing
from planner.sizing.energy import RunEnergy, energy_facts, energy_kwh, load_energy, run_energy

FACTS = energy_facts()
INPUTS = on_premises_inputs()
META_PUE = 1.09
"""Meta's data centres (alpha-one-index/ai-infra-index, 2026-03)."""


def energy(
    device: str = "h100",
    devices: int = 8,
    hours: float = 10.0,
    provider: str = "aws",
    region: str = "us-east-1",
) -> RunEnergy:
    pricing = Pricing.ON_DEMAND if provider else Pricing.ON_PREMISES
    found = run_energy(
        catalog.load_device(device),
        devices,
        hours,
        provider=provider,
        region=region,
        pricing=pricing,
        facts=FACTS,
        inputs=INPUTS,
    )
    assert found is not None
    return found


def test_the_formula_by_hand() -> None:
    found = energy()
    assert found.power_kw == pytest.approx(8 * 0.7 * 1.38)
    assert found.kwh == pytest.approx(8 * 0.7 * 1.38 * 1.14 * 10)
    assert found.carbon_kg == pytest.approx(found.kwh * 0.34348)
    assert found.grid is not None and found.grid.year == 2025


def test_twice_the_devices_or_hours_take_twice_the_energy() -> None:
    assert energy(devices=16).kwh == pytest.approx(2 * energy().kwh)
    assert energy(hours=20).carbon_kg == pytest.approx(2 * (energy().carbon_kg or 0))
    assert energy(hours=0).kwh == 0


def test_a_node_of_8_h100_draws_what_was_measured() -> None:
    """Between 76 % of 10.2 kW (arXiv 2506.14551) and the 8.4 kW of the most (arXiv 2412.08602)."""
    assert 0.76 * 10.2 * 0.99 <= energy().power_kw <= 8.4


@pytest.mark.parametrize("region", ["any", "various", "", "all regions", "us-east-99", "eu"])
def test_a_region_that_no_source_speaks_of_has_no_carbon(region: str) -> None:
    found = energy(region=region)
    assert found.carbon_kg is None and found.grid is None and found.kwh > 0


def test_the_region_decides_and_the_provider_tells_regions_of_one_name_apart() -> None:
    iowa, kansas = (
        energy(provider="gcp", region="us-central1"),
        energy(provider="nebius", region="us-central1"),
    )
    assert iowa.grid is not None and iowa.grid.name == "Iowa"
    assert kansas.grid is not None and kansas.grid.name == "United States"
    assert energy(provider="lambda", region="us").grid == kansas.grid


def test_who_publishes_no_pue_has_the_mean_of_the_industry_and_it_says_so() -> None:
    assert energy(provider="vast", region="any").pue == FACTS.industry_pue
    owned = energy(provider="", region="")
    assert owned.pue.value == INPUTS.pue.value and owned.carbon_kg is None


def test_a_device_without_a_power_has_no_energy_until_the_user_says_one() -> None:
    facts = catalog.load_device("tpu-v5p")

    def found(inputs: object) -> RunEnergy | None:
        return run_energy(
            facts, 4, 1.0, provider="gcp", region="us", pricing=Pricing.ON_DEMAND, facts=FACTS, inputs=inputs
        )  # type: ignore[arg-type]

    assert found(INPUTS) is None
    own = OnPremisesTable(devices={"tpu-v5p": OwnedDevice(tdp_w=500.0)})
    known = found(with_own(INPUTS, own, "test"))
    assert known is not None and known.power_kw == pytest.approx(4 * 0.5 * 1.38)


@pytest.mark.parametrize(
    ("run", "gpu_hours", "tdp_w", "tonnes"),
    [
        ("Llama 2 7B", 184_320, 400, 31.22),
        ("Llama 2 70B", 1_720_320, 400, 291.42),
        ("Llama 3 8B", 1_300_000, 700, 390),
        ("Llama 3 70B", 6_400_000, 700, 1_900),
        ("Llama 3.1 405B", 30_840_000, 700, 8_930),
    ],
)
def test_carbon_of_llamas_as_their_cards_count_it(
    run: str, gpu_hours: float, tdp_w: float, tonnes: float
) -> None:
    """Model cards of Llama 2, 3 and 3.1: GPU-hours x TDP, adjusted for the PUE, on the grid of the place.

    The cards say no grid; that of the country is within 8 %. They count devices only, hence a node
    factor of 1.
    """
    grid = FACTS.grid_of("", "US")
    assert grid is not None
    kwh = energy_kwh(1, gpu_hours, tdp_w, 1.0, META_PUE)
    assert kwh * grid.g_per_kwh / 1e6 == pytest.approx(tonnes, rel=0.08), run


def test_bloom_as_published() -> None:
    """433 MWh of 1,082,990 A100-hours and 24.7 t on France's grid of 57 g; with nodes and building 690 MWh
    (433,196 and 256,646 kWh; arXiv 2211.02001). Jean Zay's PUE of 1.2 is from memory."""
    devices_kwh = energy_kwh(384, 1_082_990 / 384, 400, 1.0, 1.0)
    assert devices_kwh == pytest.approx(433_196, rel=1e-4)
    assert devices_kwh * 57e-6 == pytest.approx(24.7, rel=0.005)
    whole = energy_kwh(384, 1_082_990 / 384, 400, INPUTS.node_power_over_tdp.value, 1.2)
    assert whole == pytest.approx(433_196 + 256_646, rel=0.10)


def test_every_fact_has_a_source_and_no_region_two_grids() -> None:
    regions = [region.lower() for grid in FACTS.grids for region in grid.regions]
    assert len(regions) == len(set(regions))
    for grid in FACTS.grids:
        assert grid.source and 2020 < grid.year < 2027 and 0 < grid.g_per_kwh < 1000
    assert all(pue.source and 1 < pue.value < 2 for pue in (*FACTS.pue.values(), FACTS.industry_pue))


def test_most_instances_of_the_large_clouds_have_a_grid() -> None:
    rows = [row for row in shipped_market().instances if row.provider in ("aws", "azure", "gcp", "verda")]
    known = [row for row in rows if FACTS.grid_of(row.provider, row.region) is not None]
    assert len(known) >= 0.85 * len(rows)


def test_wrong_files_are_refused_with_every_fault(tmp_path: Path) -> None:
    file = tmp_path / "energy.toml"
    file.write_text(
        "[industry_pue]\nvalue = 0.5\nsource = 'x'\n"
        "[[grids]]\nname = 'a'\ng_per_kwh = -1\nyear = 2024\nsource = 'x'\nregions = ['a']\n"
    )
    with pytest.raises(InputError) as caught:
        load_energy(file)
    assert len(caught.value.problems) == 2
    file.write_text("[industry_pue]\nvalue = 1.5\n")
    with pytest.raises(InputError, match="source"):
        load_energy(file)
