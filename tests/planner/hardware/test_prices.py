"""Prices of the user's own: they win over every other, and the answer says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from planner.cli import cli
from planner.commands.running import doctor
from planner.foundation.errors import InputError
from planner.hardware.cluster_text import parse_cluster
from planner.hardware.prices import PRICES_VARIABLE, read_market

FILE = """
as_of = 2026-11-01
source = "our contract"

[instances."aws/p5.48xlarge"]
usd_per_hour = 31.5

[instances.p4d_24xlarge]
usd_per_hour = 10.0
spot_usd_per_hour = 4.0
as_of = "2026-10-15"
source = "a letter"

[devices.H100]
usd_per_device_hour = 1.9
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "prices.toml"
    file.write_text(text.replace("p4d_24xlarge", '"p4d.24xlarge"'))
    return file


def run_json(*arguments: str) -> Any:
    result = CliRunner().invoke(cli, [*arguments, "--json"], prog_name="plan")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_an_instance_costs_what_the_user_says(tmp_path: Path) -> None:
    market = read_market(write(tmp_path, FILE))
    instance = market.instance("p5.48xlarge")
    assert (instance.ondemand_usd_per_hour, instance.as_of, instance.source) == (
        31.5,
        "2026-11-01",
        "our contract",
    )
    assert instance.spot_usd_per_hour is None, "the old spot price is not the user's"
    assert instance.price_mark == "yours" and instance.reserved_note == ""
    other = market.instance("aws/p4d.24xlarge")
    assert (other.ondemand_usd_per_hour, other.spot_usd_per_hour, other.source) == (10.0, 4.0, "a letter")
    assert market.instance("p5en.48xlarge").price_mark == "READ", "the rest keeps its price"
    assert len(market.instances) == len(read_market().instances)


def test_a_cluster_takes_the_prices_and_says_which(tmp_path: Path) -> None:
    market = read_market(write(tmp_path, FILE))
    rented = parse_cluster("4*p5.48xlarge", market=market)
    assert rented.price_usd_per_hour == pytest.approx(4 * 31.5)
    assert rented.price_sources == ("aws/p5.48xlarge 31.5 on demand, your price, 2026-11-01 (our contract)",)
    named = parse_cluster("2x8:h100", market=market)
    assert named.price_usd_per_hour == pytest.approx(16 * 1.9)
    assert named.price_sources == ("h100-sxm-80gb 1.9, 2026-11-01 (our contract)",)
    mixed = parse_cluster("4*p5.48xlarge+2x8:h100", market=market)
    assert mixed.price_usd_per_hour == pytest.approx(4 * 31.5 + 16 * 1.9)
    assert len(mixed.price_sources) == 2
    assert parse_cluster("2x8:a100", market=market).price_usd_per_hour is None


def test_without_a_file_the_catalog_says_date_and_source() -> None:
    (text,) = parse_cluster("4*azure/Standard_ND96isr_H100_v5").price_sources
    assert re.search(r"98\.32 on demand, read, 2026-09-06 \(CPM 2026-09-06", text)
    assert parse_cluster("4x8:h100").price_sources == ()
    (recalled,) = parse_cluster("1*aws/p3.16xlarge").price_sources
    assert "from memory, without a date" in recalled


def test_a_file_for_a_whole_cluster_wins(tmp_path: Path) -> None:
    cluster = tmp_path / "lab.toml"
    cluster.write_text('price_usd_per_hour = 12.5\n[[groups]]\nnodes = 1\ninstance = "p5.48xlarge"\n')
    found = parse_cluster(str(cluster), market=read_market(write(tmp_path, FILE)))
    assert found.price_usd_per_hour == 12.5
    assert found.price_sources == (f"of the whole, {cluster}",)
    cluster.write_text('[[groups]]\nnodes = 1\ninstance = "p5.48xlarge"\n')
    assert parse_cluster(str(cluster), market=read_market(write(tmp_path, FILE))).price_usd_per_hour == 31.5


def test_on_premises_prices_devices_only_where_asked(tmp_path: Path) -> None:
    assert parse_cluster("1x8:h100").price_usd_per_hour is None
    asked = parse_cluster("1x8:h100", market=read_market(on_premises=True))
    assert asked.price_usd_per_hour is not None and 8 < asked.price_usd_per_hour < 40
    assert "on premises, 70% in use" in asked.price_sources[0] and "2026-11-23" in asked.price_sources[0]
    table = "[on_premises]\nutilisation = 1.0\n"
    by_table = parse_cluster("1x8:h100", market=read_market(write(tmp_path, table)))
    assert by_table.price_usd_per_hour is not None
    assert by_table.price_usd_per_hour < asked.price_usd_per_hour
    own = parse_cluster("1x8:h100", market=read_market(write(tmp_path, FILE + table)))
    assert own.price_usd_per_hour == pytest.approx(8 * 1.9), "a price of the user's wins over a cost"
    rented = parse_cluster("1*p5.48xlarge", market=read_market(on_premises=True))
    assert rented.price_usd_per_hour == 55.04, "an instance is rented"


def test_a_device_without_a_purchase_price_stays_unknown(tmp_path: Path) -> None:
    unknown = parse_cluster("1x8:a10g", market=read_market(on_premises=True))
    assert unknown.price_usd_per_hour is None
    assert "no purchase price is known" in unknown.price_sources[0]
    text = "[on_premises.devices.a10g]\npurchase_usd = 3000\nas_of = 2026-01-02\nsource = 'invoice'\n"
    known = parse_cluster("1x8:a10g", market=read_market(write(tmp_path, text)))
    assert known.price_usd_per_hour is not None and "2026-01-02" in known.price_sources[0]


def test_the_environment_names_a_file_and_the_flag_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PRICES_VARIABLE, str(write(tmp_path, FILE)))
    assert read_market().instance("p5.48xlarge").ondemand_usd_per_hour == 31.5
    flag = tmp_path / "other.toml"
    flag.write_text('[instances."p5.48xlarge"]\nusd_per_hour = 20.0\n')
    assert read_market(flag).instance("p5.48xlarge").ondemand_usd_per_hour == 20.0
    assert read_market(flag).instance("p5.48xlarge").source == str(flag), "the file is the source"
    monkeypatch.setenv(PRICES_VARIABLE, str(tmp_path / "absent.toml"))
    with pytest.raises(InputError, match="no such file"):
        read_market()


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("[instances.'p5.48xlage']\nusd_per_hour = 1.0", "instances.p5.48xlage.*48xlarge"),
        ("[devices.h101]\nusd_per_device_hour = 1.0", "devices.h101.*h100"),
        ("[on_premises.devices.h101]\npurchase_usd = 1.0", "on_premises.devices.h101"),
        ("[devices.h100]\nusd_per_device_hour = nan", "devices.h100.usd_per_device_hour"),
        ("[devices.h100]\nusd_per_device_hour = inf", "devices.h100.usd_per_device_hour"),
        ("[devices.h100]\nusd_per_device_hour = -1.0", "devices.h100.usd_per_device_hour.*0 to 1e"),
        ("[devices.h100]\nusd_per_device_hour = 1e300", "0 to 1e"),
        ("[devices.h100]\nusd_per_device_hour = '1.9'", "devices.h100.usd_per_device_hour.*number"),
        ("[devices.h100]\nusd_per_hour = 1.9", "usd_per_device_hour"),
        ("[devices.h100]\nusd_per_device_hour = 1\n[devices.h100-80gb]\nusd_per_device_hour = 2", "second"),
        ("[instances.'p5.48xlarge']\nas_of = '2026-01-01'", "has no price"),
        ("[instances.'p5.48xlarge']\nusd_per_hour = -3.0", "usd_per_hour"),
        ("[instances.'p5.48xlarge']\nusd_per_hour = 3.0\nspot_usd_per_hour = nan", "spot_usd_per_hour"),
        ("[on_premises]\nutilisation = 0.0", "on_premises.utilisation.*0.01 to 1"),
        ("[on_premises]\nyears = -1.0", "on_premises.years"),
        ("[on_premises]\nyear = 3.0", "on_premises.year"),
        ("[on_premises.devices.h100]\npurchase_usd = -1.0", "h100.purchase_usd"),
        ("[devies.h100]\nusd_per_device_hour = 1", "devies"),
        ("as_of = [1]", "as_of"),
        ("instances = 3", "instances"),
        ("= broken", "is not TOML"),
        ("\x00\x01\x02", "is not TOML"),
        (".".join(["a"] * 200_000) + " = 1", "prices.toml.*nested too deeply"),
        ("[" + ".".join(["'a'"] * 200_000) + "]", "prices.toml.*nested too deeply"),
        ("x = {" + ".".join(["a"] * 200_000) + " = 1}", "prices.toml.*nested too deeply"),
        ("a = " + "[" * 20_000, "prices.toml"),
        (f"[devices.h100]\nusd_per_device_hour = {'9' * 5000}", "prices.toml"),
    ],
)
def test_wrong_files_are_refused_at_the_path_of_the_fault(tmp_path: Path, text: str, path: str) -> None:
    with pytest.raises(InputError, match=rf"(?s){path}"):
        read_market(write(tmp_path, text))


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    text = "[devices.h101]\nusd_per_device_hour = -1\n[on_premises]\npue = 0.1\n"
    with pytest.raises(InputError) as caught:
        read_market(write(tmp_path, text))
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("text", ["", "# " + "." * 300, f'source = "{"x." * 300}"\n', "as_of = '2026-11-01'"])
def test_files_that_say_little_change_nothing(tmp_path: Path, text: str) -> None:
    assert read_market(write(tmp_path, text)).instances == read_market().instances


def test_a_folder_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="folder"):
        read_market(tmp_path)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="is not TOML"):
        read_market(tmp_path / "binary")


def test_a_doubtful_price_is_named_until_the_user_gives_one(tmp_path: Path) -> None:
    (text,) = parse_cluster("1*verda/1V100").price_sources
    assert re.search(r"verda/1V100 0\.138 on demand, read.*doubtful", text)
    file = write(tmp_path, "[instances.'verda/1V100']\nusd_per_hour = 0.2\n")
    (own,) = parse_cluster("1*verda/1V100", market=read_market(file)).price_sources
    assert "0.2 on demand, your price" in own and ": doubtful," not in own


def test_the_commands_take_the_file(tmp_path: Path) -> None:
    file = str(write(tmp_path, FILE))
    listed = {row["name"]: row for row in run_json("list", "instances", "--prices", file)["instances"]}
    assert listed["aws/p5.48xlarge"]["ondemand_usd_per_hour"] == 31.5
    assert listed["aws/p5.48xlarge"]["source"] == "our contract"
    assert run_json("show", "instance", "p5.48xlarge", "--prices", file)["price_mark"] == "yours"
    cluster = run_json("show", "cluster", "2x8:h100", "--prices", file)
    assert cluster["price_usd_per_hour"] == pytest.approx(30.4)
    arguments = ["estimate", "--model", "gpt-2-124m", "--cluster", "1x8:h100", "--seq", "1024"]
    arguments += ["--batch", "8", "--tokens", "1B", "--prices", file]
    priced = run_json(*arguments)
    hours = priced["estimate"]["days"] * 24
    assert priced["estimate"]["cost_usd"] == pytest.approx(8 * 1.9 * hours)
    result = CliRunner().invoke(cli, arguments, prog_name="plan")
    assert "h100-sxm-80gb 1.9, 2026-11-01 (our contract)" in result.stdout


def test_doctor_reads_the_file_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state() -> str:
        found = {finding["what"]: finding for finding in run_json("doctor")["findings"]}
        return str(found["prices of your own"]["state"])

    monkeypatch.setattr(doctor, "_torch_facts", lambda: None)  # asks torch in a process of its own: seconds
    assert state() == "note"
    monkeypatch.setenv(PRICES_VARIABLE, str(write(tmp_path, FILE)))
    assert state() == "ok"
    write(tmp_path, "[devices.h101]\nusd_per_device_hour = 1\n")
    assert state() == "missing"


def test_the_flags_are_refused_where_they_mean_nothing(tmp_path: Path) -> None:
    file = str(write(tmp_path, FILE))
    for arguments in (["list", "models", "--prices", file], ["show", "model", "gpt-2-124m", "--on-premises"]):
        result = CliRunner().invoke(cli, arguments, prog_name="plan")
        assert result.exit_code == 2 and "--prices" in result.stderr
    wrong = tmp_path / "wrong.toml"
    wrong.write_text("[devices.h101]\nusd_per_device_hour = 1\n")
    result = CliRunner().invoke(
        cli,
        [
            "estimate",
            "--model",
            "nosuch",
            "--cluster",
            "1x8:b101",
            "--seq=8",
            "--batch=1",
            f"--prices={wrong}",
        ],
        prog_name="plan",
    )
    assert result.exit_code == 2
    assert all(name in result.stderr for name in ("nosuch", "b101", "h101")), "all faults at once"


def test_list_names_doubtful_prices_on_stderr() -> None:
    result = CliRunner().invoke(cli, ["list", "instances"], prog_name="plan")
    assert "warning: verda/1V100 is doubtful: costs 0.138 dollars a device-hour" in result.stderr
    assert "verda/1V100" in result.stdout and "warning" not in result.stdout


def test_show_device_has_its_cost_on_premises() -> None:
    shown = run_json("show", "device", "h100")["on_premises"]
    causes = ("written_off_usd", "energy_usd", "facility_usd", "staff_usd")
    assert shown["total_usd"] == pytest.approx(sum(shown[cause] for cause in causes))
    assert run_json("show", "device", "a10g")["on_premises"] is None
