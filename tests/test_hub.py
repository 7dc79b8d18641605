"""The Hub as a stranger meets it: gated, absent, unreachable, silent, broken off; and as it is on a good day.

A fake Hub on loopback answers what huggingface_hub asks. HF_ENDPOINT is read when huggingface_hub is
imported, so every case runs in a process of its own; its time is what a person waits for the line.
"""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from aquila_sft import hub, snapshot
from aquila_sft.errors import UserError

PIN = "bddc39a8feadbd679c30623197f4e736b7e75b48"  # data/manifests/infinity_instruct.yaml
MAIN = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES = {
    "datasets/BAAI/Infinity-Instruct": (
        PIN,
        {
            "README.md": b"card",
            "0625/train-00000-of-00002.parquet": b"PAR1 first",
            "0625/train-00001-of-00002.parquet": b"PAR1 second",
            "7M/train-00000-of-00001.parquet": b"PAR1 other subset",
            **{
                f"7M_domains/{domain}/train-00000-of-00001.parquet": f"PAR1 {domain}".encode()
                for domain in ("code", "commonsense", "math", "subjective")
            },
        },
    ),
    "models/BAAI/Aquila-135M": (
        MAIN,
        {
            "config.json": b"{}",
            "generation_config.json": b"{ }",
            "model.safetensors": b"weights",
            "qwen.tiktoken": b"IQ== 0",
            "tokenizer_config.json": b"{  }",
            "modeling_trap.py": b"raise SystemExit",
            "pytorch_model.bin": b"pickle",
            "old/model.safetensors": b"old",
        },
    ),
    "models/BAAI/Aquila-135M-Intermediate": (
        MAIN,
        {
            "README.md": b"card",
            **{
                f"{folder}/{name}": name.encode()
                for folder in ("pretrain/iter_0250000_hf", "pretrain/iter_0500000_hf", "annealing/iter_0084772_hf")
                for name in ("config.json", "model.safetensors", "qwen.tiktoken", "tokenization_qwen.py")
            },
        },
    ),
    "models/BAAI/Pickled": (MAIN, {"config.json": b"{}", "pytorch_model.bin": b"pickle"}),
}
REFUSALS = {  # mode -> status, header, header of the Hub's answer
    "private": (401, "X-Error-Message", "Invalid username or password."),
    "absent": (404, "X-Error-Code", "RepoNotFound"),
    "no such revision": (404, "X-Error-Code", "RevisionNotFound"),
    "down": (503, "X-Error-Message", "maintenance"),
}


class FakeHub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub_, mode = self.server, self.server.mode
        path = unquote(urlsplit(self.path).path).strip("/")
        hub_.asked.append((self.command, path))
        if mode == "silent":
            hub_.closing.wait(60)
        elif mode == "drips":
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while not hub_.closing.wait(0.3):  # each byte in time, the answer never
                self.wfile.write(b"X")
        elif mode == "login page":
            self.answer(200, b"<html>Welcome to the hotel</html>", Content_Type="text/html")
        elif mode in REFUSALS:
            status, name, value = REFUSALS[mode]
            self.answer(status, **{name: value})
        elif found := re.fullmatch(r"api/(\w+/[\w.-]+/[\w.-]+)(/tree/\w+|/revision/\w+)?", path):
            commit, files = REPOSITORIES[found[1]]
            blobs = [(name, len(data), hashlib.sha1(data).hexdigest()) for name, data in files.items()]
            if "/tree/" in path:
                listing = [{"type": "file", "path": n, "size": s, "oid": o} for n, s, o in blobs]
            else:
                listing = {
                    "id": found[1].split("/", 1)[1],
                    "sha": commit,
                    "siblings": [{"rfilename": n, "size": s, "blobId": o} for n, s, o in blobs],
                }
            self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")
        elif found := re.fullmatch(r"(datasets/)?([\w.-]+/[\w.-]+)/resolve/\w+/(.*)", path):
            kind, name, file = found.groups()
            commit, files = REPOSITORIES[(kind or "models/") + name]
            if mode == "gated":  # the listing of a gated repository is public
                status = 403 if "Authorization" in self.headers else 401
                self.answer(status, X_Error_Code="GatedRepo")
            elif mode == "breaks off" and self.command == "GET" and file.endswith("00001-of-00002.parquet"):
                self.answer(500)
            else:
                etag = hashlib.sha1(files[file]).hexdigest()
                self.answer(200, files[file], X_Repo_Commit=commit, ETag=f'"{etag}"')
        else:  # what huggingface_hub asks of its own accord
            self.answer(404)


@pytest.fixture
def fake_hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.daemon_threads = True
    server.mode, server.asked, server.closing = "open", [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()

    def stop():
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()

    server.stop = stop
    yield server
    if not server.closing.is_set():
        stop()


class Outcome:
    def __init__(self, result, seconds):
        self.status, self.out, self.seconds = result.returncode, result.stdout.strip(), seconds
        self.err = result.stderr
        self.last_line = (result.stderr.strip().splitlines() or [""])[-1]


@pytest.fixture
def ask(tmp_path):
    """ask(code, url, **env): what a process says that runs `code` with the Hub at url, and after how long."""

    def ask(code, url, **env):
        program = textwrap.dedent("""
            import sys
            from aquila_sft import hub, snapshot
            from aquila_sft.errors import UserError
            try:
                {}
            except UserError as error:
                print(f"error: {{error}}", file=sys.stderr)
                sys.exit(2)
            """).format(textwrap.indent(textwrap.dedent(code).strip(), " " * 4).strip())
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) and not k.lower().endswith("_proxy")
        }
        start = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=tmp_path,
            env=kept
            | {
                "HF_ENDPOINT": url,
                "HF_HOME": str(tmp_path / "hf"),
                "NO_PROXY": "*",
                "PYTHONPATH": str(Path(hub.__file__).parents[1]),
            }
            | env,
        )
        return Outcome(result, time.monotonic() - start)

    return ask


DATA = 'd = hub.dataset_files("infinity_instruct", "0625"); print(d.revision, *d.files)'
MODEL = 'print(hub.model_folder("BAAI/Aquila-135M", None))'


def assert_one_line_names_the_three_ways(said, reason, way=("datasets/BAAI/Infinity-Instruct", "data.files=")):
    assert said.status == 2, said.err
    assert said.seconds < 10
    assert said.err.count("\n") == 1, said.err
    for part in (
        "error: cannot get",
        reason,
        f"https://huggingface.co/{way[0]} ",
        "hf auth login",
        "HF_TOKEN",
        way[1],
        "scale=mini",
    ):
        assert part in said.last_line, (part, said.last_line)


@pytest.mark.parametrize(
    "mode, env, reason",
    [
        ("gated", {}, "gated and nobody is logged in"),
        ("gated", {"HF_TOKEN": "hf_x"}, "gated and this account has no access"),
        ("private", {}, "401, nobody is logged in"),
        ("private", {"HF_TOKEN": "hf_x"}, "401, the token was refused"),
        ("absent", {}, "there is no such repository"),
        ("no such revision", {}, "no such revision"),
        ("down", {}, "answered 503"),
        ("login page", {}, "did not answer like a Hub"),
        ("open", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ("open", {"HF_TOKEN": "令牌"}, "HF_TOKEN has a character"),
    ],
)
def test_a_refusing_hub_ends_in_one_line(ask, fake_hub, mode, env, reason):
    fake_hub.mode = mode
    assert_one_line_names_the_three_ways(ask(DATA, fake_hub.url, **env), reason)


def test_a_gated_model_names_its_own_page_and_setting(ask, fake_hub):
    fake_hub.mode = "gated"
    said = ask(MODEL, fake_hub.url)
    assert_one_line_names_the_three_ways(said, "gated", ("BAAI/Aquila-135M", "model.path="))


@pytest.mark.slow
def test_a_hub_that_accepts_and_never_answers_takes_less_than_ten_seconds(ask, fake_hub):
    fake_hub.mode = "silent"
    assert_one_line_names_the_three_ways(ask(DATA, fake_hub.url), "did not answer in time")


def test_a_refused_connection_ends_in_one_line(ask, fake_hub):
    fake_hub.stop()
    assert_one_line_names_the_three_ways(ask(DATA, fake_hub.url), "Connection refused")


@pytest.mark.parametrize("trouble", ["drips", "black hole", "name resolution hangs", "name unknown"])
def test_no_kind_of_silence_outlasts_the_probe(ask, fake_hub, trouble):
    code, url, reason = "snapshot.PROBE_S = 1.0\n" + DATA, fake_hub.url, "did not answer in time"
    with socket.socket() as hole:
        if trouble == "drips":
            fake_hub.mode = "drips"
        elif trouble == "black hole":  # a full backlog: connecting hangs
            hole.bind(("127.0.0.1", 0))
            hole.listen(0)
            url = f"http://127.0.0.1:{hole.getsockname()[1]}"
            fillers = [socket.socket() for _ in range(4)]
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(hole.getsockname())
        elif trouble == "name resolution hangs":
            code = "import socket, time; socket.getaddrinfo = lambda *a, **k: time.sleep(60)\n" + code
        else:
            url, reason = "http://hub.invalid", "no connection to http://hub.invalid"
            code = (
                "import socket\ndef unknown(*a, **k): raise socket.gaierror(-2, 'Name not known')\n"
                "socket.getaddrinfo = unknown\n" + code
            )
        said = ask(code, url)
    assert_one_line_names_the_three_ways(said, reason)
    assert said.seconds < 5


def test_a_subset_is_downloaded_and_the_pin_then_needs_no_hub(ask, fake_hub):
    first = ask(DATA, fake_hub.url)
    assert first.status == 0, first.err
    commit, *files = first.out.split()
    assert commit == PIN
    assert [Path(f).read_bytes() for f in files] == [b"PAR1 first", b"PAR1 second"]
    assert "2 of 2 files" in first.err
    assert not any("7M" in path for _, path in fake_hub.asked)
    fake_hub.stop()
    again = ask(DATA, fake_hub.url)
    assert (again.status, again.out, again.err) == (0, first.out, "")
    assert ask(DATA, fake_hub.url, HF_HUB_OFFLINE="1").out == first.out
    # Another subset is not in that snapshot: half of it is not silently taken for all of it.
    other = ask(DATA.replace("0625", "7M_domains"), fake_hub.url)
    assert_one_line_names_the_three_ways(other, "Connection refused")


def test_a_file_that_vanished_from_the_cache_is_noticed_even_without_its_listing(ask, fake_hub, tmp_path):
    files = ask(DATA, fake_hub.url).out.split()[1:]
    Path(files[1]).unlink()
    for listing in tmp_path.glob("hf/hub/*/trees/*"):  # written by recent versions of huggingface_hub only
        listing.unlink()
    assert_one_line_names_the_three_ways(ask(DATA, fake_hub.url, HF_HUB_OFFLINE="1"), "no complete copy")
    assert ask(DATA, fake_hub.url).out.split()[1:] == files


def test_domains_are_one_subset(ask, fake_hub):
    said = ask(DATA.replace("0625", "7M_domains"), fake_hub.url)
    assert [Path(f).parent.name for f in said.out.split()[1:]] == ["code", "commonsense", "math", "subjective"]


def test_a_domain_alone_is_fetched_alone_and_never_taken_for_all_of_them(ask, fake_hub, tmp_path):
    alone = ask(DATA.replace("0625", "7M_domains/math"), fake_hub.url)
    assert [Path(f).read_bytes() for f in alone.out.split()[1:]] == [b"PAR1 math"]
    assert not any("code" in path for _, path in fake_hub.asked)
    for listing in tmp_path.glob("hf/hub/*/trees/*"):  # written by recent versions of huggingface_hub only
        listing.unlink()
    fake_hub.stop()
    assert ask(DATA.replace("0625", "7M_domains/math"), fake_hub.url).out == alone.out
    all_of_them = ask(DATA.replace("0625", "7M_domains"), fake_hub.url)
    assert_one_line_names_the_three_ways(all_of_them, "Connection refused")


def test_a_broken_download_is_one_line_and_the_same_command_goes_on(ask, fake_hub):
    fake_hub.mode = "breaks off"
    broken = ask(DATA, fake_hub.url)
    assert broken.status == 2 and "Traceback" not in broken.err
    assert re.match("error: cannot get .*download broke off .*same command goes on", broken.last_line)
    fake_hub.mode = "open"
    assert ask(DATA, fake_hub.url).status == 0
    got = [Path(path).name for command, path in fake_hub.asked if command == "GET" and "/resolve/" in path]
    assert got.count("train-00000-of-00002.parquet") == 1


def test_a_disk_without_room_is_one_line_before_the_first_byte(ask, fake_hub):
    said = ask(
        "import shutil; from types import SimpleNamespace\n"
        "shutil.disk_usage = lambda path: SimpleNamespace(free=3)\n" + DATA,
        fake_hub.url,
    )
    assert said.status == 2 and "no space left" in said.last_line and "HF_HOME" in said.last_line
    assert not any(command == "GET" and "/resolve/" in path for command, path in fake_hub.asked)


def test_a_model_comes_without_code_and_pickles_and_stays_usable_offline(ask, fake_hub):
    said = ask(MODEL, fake_hub.url)
    assert said.status == 0, said.err
    folder = Path(said.out)
    assert folder.name == MAIN
    assert sorted(p.name for p in folder.rglob("*")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "qwen.tiktoken",
        "tokenizer_config.json",
    ]
    assert ask(MODEL, fake_hub.url, HF_HUB_OFFLINE="1").out == said.out
    fake_hub.stop()
    without = ask(MODEL, fake_hub.url)  # `main` may have moved on since
    assert without.out == said.out
    assert MAIN in without.err and without.err.startswith("note: no connection")


def test_a_checkpoint_in_a_subfolder_comes_alone_and_stays_usable_offline(ask, fake_hub):
    code = 'print(hub.model_folder("BAAI/Aquila-135M-Intermediate", None, "pretrain/iter_0500000_hf"))'
    said = ask(code, fake_hub.url)
    assert said.status == 0, said.err
    folder = Path(said.out)
    assert folder.parts[-3:] == (MAIN, "pretrain", "iter_0500000_hf") and hub.commit_of(folder) == MAIN
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors", "qwen.tiktoken"]
    assert not [p for p in folder.parents[1].rglob("iter_*") if p.name != folder.name]
    assert ask(code, fake_hub.url, HF_HUB_OFFLINE="1").out == str(folder)
    absent = ask(code.replace("0500000", "0600000"), fake_hub.url)
    assert absent.status == 2 and "no pretrain/iter_0600000_hf/config.json" in absent.last_line, absent.err


def test_a_subfolder_that_a_local_folder_lacks_names_those_that_hold_models(tmp_path):
    for name in ("pretrain/iter_1", "annealing/iter_2"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    assert hub.model_folder(str(tmp_path), None, "pretrain/iter_1") == tmp_path / "pretrain/iter_1"
    with pytest.raises(UserError, match="did you mean annealing/iter_2.*annealing/iter_2, pretrain/iter_1"):
        hub.model_folder(str(tmp_path), None, "annealing/iter_3")


def test_a_model_of_pickles_is_refused(ask, fake_hub):
    said = ask(MODEL.replace("Aquila-135M", "Pickled"), fake_hub.url)
    assert said.status == 2 and "no *.safetensors" in said.last_line


def test_a_local_folder_needs_no_network_and_no_huggingface_hub(ask, tmp_path):
    (tmp_path / "base").mkdir()
    said = ask(
        f"""
        import socket
        def refuse(*args, **kwargs): raise AssertionError("network")
        socket.socket = socket.getaddrinfo = socket.create_connection = refuse
        print(hub.model_folder("base", None), hub.model_folder({str(tmp_path / "base")!r}, None))
        assert "huggingface_hub" not in sys.modules
        """,
        "http://hub.invalid",
    )
    assert said.out == f"base {tmp_path / 'base'}", said.err


@pytest.mark.parametrize(
    "path",
    [
        "/no/such",
        "./no",
        "../no",
        "~/no-such-folder",
        "outputs/mini/sft",
        "a\\b",
        "model.safetensors",
        "https://huggingface.co/BAAI/Aquila-135M",
        "",
        "a b",
        "a--b",
    ],
)
def test_what_looks_local_or_is_no_id_is_refused_without_asking_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a run may lie under outputs/ where the tests are started
    monkeypatch.setattr(snapshot, "fetch", lambda wanted: pytest.fail("asked the Hub"))
    with pytest.raises(UserError, match="model.path="):
        hub.model_folder(path, None)


@pytest.mark.parametrize("path", ["Qwen/Qwen2.5-0.5B", "HuggingFaceTB/SmolLM2-1.7B", "gpt2"])
def test_an_id_with_a_dot_is_still_an_id(path, monkeypatch):
    monkeypatch.setattr(snapshot, "fetch", lambda wanted: wanted.repo)
    assert hub.model_folder(path, None) == path


def test_needs_hub_is_true_for_ids_only(tmp_path):
    assert not any(hub.needs_hub(path) for path in (None, "random", str(tmp_path)))
    assert hub.needs_hub("BAAI/Aquila-135M")


@pytest.mark.parametrize(
    "manifest, subset, message",
    [
        ("infinity_instruct", "625", "7M_core, 0625, .*did you mean 0625"),
        (
            "infinity_instruct",
            "7M_domains/maths",
            "7M_domains/code, 7M_domains/commonsense.*did you mean 7M_domains/math",
        ),
        ("infinity_instruct", None, "data.subset=None is not one of 3M, 7M"),
        ("infinity-instruct", "0625", "data.manifest=infinity-instruct .*did you mean infinity_instruct"),
    ],
)
def test_an_unknown_manifest_or_subset_names_the_choices(manifest, subset, message):
    with pytest.raises(UserError, match=message):
        hub.dataset_files(manifest, subset)


@pytest.mark.parametrize("file", sorted(hub.MANIFESTS.glob("*.yaml")), ids=lambda f: f.stem)
def test_a_manifest_pins_a_commit_where_one_is_known_and_names_files_and_rows(file):
    import yaml

    about = yaml.safe_load(file.read_text("utf-8"))
    assert about["revision"] is None or snapshot.COMMIT.fullmatch(about["revision"])
    assert about["licence"] and about["gated"] in (True, False, None) and about["columns"]
    assert about.get("default_subset", next(iter(about["subsets"]))) in about["subsets"]
    for name, subset in about["subsets"].items():
        assert isinstance(name, str) and subset["files"] and set(subset) == {"files", "rows"}
