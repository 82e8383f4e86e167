"""The server of `plan web`: for this machine alone, read-only, clear about bad input, quick to give up."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator

import pytest

from planner.foundation.errors import InputError
from planner.report.web.app import listen
from planner.report.web.requests import FIELDS, arguments, at_first, check_model, own_hosts, read_query
from tests.html_reader import Reader
from tests.web_server import Sampled, Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running


# Who may ask what


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "[::1]:{port}", "0.0.0.0:{port}", ""],
)  # fmt: skip
def test_other_hosts_are_refused(served: Served, host: str) -> None:
    answer = served.ask("/", Host=host.format(port=served.port))
    assert answer.status == 403 and "Host" in answer.text and "llama" not in answer.text


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}"])
def test_its_own_address_is_answered(served: Served, host: str) -> None:
    assert served.ask("/", Host=host.format(port=served.port)).status == 200


def test_without_a_host_nothing_is_answered(served: Served) -> None:
    import socket

    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        raw.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b" 403 " in raw.recv(100)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1:{port}"]
)
@pytest.mark.parametrize("path", ["/", "/comparison.json", "/plan.json?cluster=x"])
def test_other_origins_are_refused(served: Served, origin: str, path: str) -> None:
    answer = served.ask(path, Origin=origin.format(port=served.port))
    assert answer.status == 403 and "Origin" in answer.text
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_its_own_origin_is_answered_without_cors(served: Served) -> None:
    answer = served.ask("/", Origin=served.address)
    assert answer.status == 200
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_what_the_browser_marks_as_anothers_is_refused(served: Served) -> None:
    assert served.ask("/comparison.json", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors").status == 403
    assert served.ask("/comparison.json", Sec_Fetch_Site="same-site", Sec_Fetch_Mode="cors").status == 403
    assert served.ask("/", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="navigate").status == 200
    assert served.ask("/comparison.json", Sec_Fetch_Site="same-origin", Sec_Fetch_Mode="cors").status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW"])
def test_only_get(served: Served, method: str) -> None:
    answer = served.ask("/", method=method)
    assert answer.status == 405 and answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize("path", ["/", "/comparison.csv", "/nothing", "/?deadline=soon"])
def test_every_answer_has_the_headers_that_forbid(served: Served, path: str) -> None:
    headers = served.ask(path).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none';") and "frame-ancestors 'none'" in policy
    assert "unsafe-eval" not in policy and "script-src 'unsafe-inline'" not in policy
    assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["referrer-policy"] == "no-referrer" and headers["cache-control"] == "no-store"
    assert "server" not in headers


def test_scripts_carry_the_nonce_of_their_answer(served: Served) -> None:
    first, second = served.ask("/"), served.ask("/")
    nonces = [a.headers["content-security-policy"].split("'nonce-")[1].rstrip("'") for a in (first, second)]
    assert nonces[0] != nonces[1]
    assert first.text.count("<script") == first.text.count(f'<script nonce="{nonces[0]}">') == 2


# The page and its files


def test_the_page_answers_with_form_and_comparison(served: Served) -> None:
    page = Reader(served.ask("/?model=llama-3-70b&deadline=30d").text)
    names = {value for tag, name, value in page.attributes if tag in ("input", "select") and name == "name"}
    assert set(FIELDS) <= names
    assert {"answer", "main", "plot", "options", "basis"} <= set(page.ids)
    assert "The cheapest way that keeps a deadline of 30 days" in page.text
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_files_are_downloads(served: Served) -> None:
    table = served.ask("/comparison.csv?model=llama-3-70b")
    assert (
        table.status == 200
        and table.headers["content-disposition"] == 'attachment; filename="comparison.csv"'
    )
    document = served.ask("/comparison.json?model=llama-3-70b")
    assert json.loads(document.text)["model"] == "llama-3-70b"
    cluster = json.loads(document.text)["options"][0]["cluster"]
    assert cluster in table.text
    plan = served.ask("/plan.json?" + urllib.parse.urlencode({"model": "llama-3-70b", "cluster": cluster}))
    assert json.loads(plan.text) == {"cluster": cluster, "model": "llama-3-70b"}
    assert plan.headers["content-disposition"] == 'attachment; filename="plan.json"'


@pytest.mark.parametrize(
    "cluster", ["", "cluster=", "cluster=1*aws/other", "cluster=%2Fetc%2Fpasswd", "cluster=a&cluster=b"]
)
def test_only_options_of_the_comparison_have_a_plan(served: Served, cluster: str) -> None:
    answer = served.ask("/plan.json?" + cluster)
    assert answer.status == 400 and answer.text.startswith("cluster: is ")


# Bad input


def test_a_fault_is_told_inside_the_page(served: Served) -> None:
    answer = served.ask("/?deadline=soon")
    page = Reader(answer.text)
    assert answer.status == 400
    assert "--deadline: 'soon' is <b>no time</b>. Fix: such as 30d." in page.text
    assert "b" not in page.tags and "Traceback" not in answer.text
    typed = [dict_ for dict_ in page.attributes if dict_ == ("input", "value", "soon")]
    assert typed, "what was typed stays in its field"


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("modell=x", "modell: is no field of this page. Fix: did you mean 'model'."),
        ("model=lama-3-8b", "'lama-3-8b' is not in the catalog. Legal here: llama-3-8b"),
        ("model=/etc/passwd", "'/etc/passwd' is not in the catalog."),
        ("model=" + "x" * 300, "Model: has 300 characters."),
        ("model=llama-3-8b&model=llama-3-70b", "Model: is given several times."),
        ("tokens=1%002", "has characters that cannot be printed."),
        ("device=" + "a," * 50, "Devices: has 51 values."),
        ("<script>alert(1)</script>=1", "<script>alert(1)</script>: is no field of this page."),
    ],
)
def test_wrong_queries_are_told(served: Served, query: str, words: str) -> None:
    answer = served.ask("/?" + query.replace(" ", "%20").replace("<", "%3C").replace(">", "%3E"))
    page = Reader(answer.text)
    assert answer.status == 400 and words in page.text
    assert page.tags.count("script") == 2
    assert served.ask("/comparison.json?" + query.replace("<", "%3C").replace(">", "%3E")).status == 400


def test_all_faults_at_once() -> None:
    with pytest.raises(InputError) as raised:
        read_query([("modell", "x"), ("seq", "y" * 400), ("tokens", "1"), ("tokens", "2")])
    assert len(raised.value.problems) == 3


def test_too_long_a_query_is_refused(served: Served) -> None:
    assert served.ask("/?model=" + "x" * 7000).status == 414


def test_what_nobody_foresaw_has_no_traceback(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    answer = served.ask("/?budget=broken")
    assert answer.status == 500 and "secret" not in answer.text and "Traceback" not in answer.text
    told, ends = "", time.monotonic() + 30
    while not told.endswith("\n") and time.monotonic() < ends:
        told += capfd.readouterr().err
        time.sleep(0.05)
    assert told == "internal error: RuntimeError: secret of the server\n"
    assert served.ask("/").status == 200


# What is asked of the planner


def test_the_form_is_a_command_line() -> None:
    asked = read_query(
        [("model", " llama-3-8b "), ("deadline", ""), ("device", "h100, , b200"), ("nodes", "2,4"),
         ("instance", "64*p5.48xlarge"), ("provider", "")]
    )  # fmt: skip
    words = arguments(asked)
    assert "--model=llama-3-8b" in words and "--batch=4Mtok" in words
    assert not [word for word in words if word.startswith(("--deadline", "--provider", "--tokens"))]
    assert [w for w in words if w.startswith("--device")] == ["--device=h100", "--device=b200"]
    assert "--instance=p5.48xlarge" in words
    assert [w for w in words if w.startswith("--nodes")] == ["--nodes=2", "--nodes=4", "--nodes=64"]


def test_no_field_becomes_another_option() -> None:
    asked = read_query([("tokens", "--help"), ("device", "--profile=/etc/passwd")])
    assert "--tokens=--help" in arguments(asked) and "--device=--profile=/etc/passwd" in arguments(asked)


def test_models_that_the_server_was_started_with_may_be_named() -> None:
    check_model(read_query([("model", "mine/config.json")]), ["mine/config.json"])
    with pytest.raises(InputError, match="plan web --model FILE"):
        check_model(read_query([("model", "other.json")]), ["mine/config.json"])


def test_a_model_may_be_named_by_any_of_its_names() -> None:
    """As on the command line; files still may not."""
    check_model(read_query([("model", "llama-3-70b")]), [])
    check_model(read_query([("model", "Mixtral-8x7B")]), [])


def test_equal_questions_are_answered_once() -> None:
    with serving() as running:
        for path in ("/?deadline=9d", "/comparison.csv?deadline=9d", "/?deadline=9d&model=llama-3-8b"):
            assert running.ask(path).status == 200
        assert running.sampled.compared == ["9d"]


def test_the_newest_question_wins_and_the_server_goes_on_answering() -> None:
    with serving(Sampled(slow_s=20.0)) as running:
        statuses: dict[str, int] = {}

        def ask(days: str) -> None:
            statuses[days] = running.ask(f"/?deadline={days}").status

        threads = [threading.Thread(target=ask, args=(days,)) for days in ("7d", "8d")]
        for thread in threads:
            thread.start()
            while len(running.sampled.compared) < 1:
                time.sleep(0.01)
            assert running.ask("/nothing").status == 404, "answered while a search runs"
            time.sleep(0.1)
        running.sampled.slow_s = 0.0
        assert running.ask("/?deadline=10d").status == 200
        for thread in threads:
            thread.join()
        assert statuses == {"7d": 409, "8d": 409}
        assert running.sampled.given_up == ["7d", "8d"] and running.sampled.compared == ["7d", "8d", "10d"]


# Starting


def test_a_port_that_is_taken_is_told() -> None:
    taken = listen(0)
    with pytest.raises(InputError, match=r"--port: \d+ on 127.0.0.1 cannot be had: .* Fix: another port"):
        listen(taken.getsockname()[1])
    taken.close()


def test_only_this_machine_is_listened_to() -> None:
    listening = listen(0)
    assert listening.getsockname()[0] == "127.0.0.1"
    listening.close()


def test_own_hosts_have_the_port() -> None:
    assert own_hosts(8421) == {"127.0.0.1:8421", "localhost:8421"}
    assert "localhost" in own_hosts(80)


def test_every_field_has_a_value_at_first() -> None:
    assert read_query([]) == at_first()


def test_without_the_extra_it_says_how_to_get_it() -> None:
    code = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('starlette', 'uvicorn') else real(name, *a)\n"
        "from planner.commands.shared.with_web import require_web\n"
        "from planner.foundation.errors import InputError\n"
        "try:\n    require_web('web')\nexcept InputError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == (
        "plan web: needs starlette and uvicorn, not installed; plan compare --html needs neither. "
        "Fix: pip install 'shardwise[web]'.\n"
    )
