"""The command line on real input and on bad input: one helpful line, a non-zero exit code, never a traceback."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opentq.cli import main as cli
from opentq.spec.recommended import recommend

TINY = Path(__file__).parents[1] / "models" / "tiny-llama"
QUESTION = "# The secret code of Babilu is 48213.\n\nimport os\nimport sys\nWhat is the secret code of Babilu?"


def test_help_is_quick():
    """Processor seconds, which a busy machine does not stretch as it does the clock's."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "opentq", "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 0.5, times


@pytest.mark.parametrize("kv", ["int4", "k8v4|int4|int4|int4|int4|k8v4", "f16"])
def test_generate_answers_from_a_file(run, tmp_path, kv):
    prompt, answer = tmp_path / "prompt.txt", tmp_path / "answer.txt"
    prompt.write_text(QUESTION)
    args = ["--model", str(TINY), "--kv", kv, "--prompt-file", str(prompt), "-m", "16", "--json", "-o", str(answer)]
    code, out, err = run("generate", *args)
    assert code == 0, err
    record = json.loads(out.splitlines()[-1])
    assert "48213" in record["text"] and record["kv_spec"] == kv and record["prompt_tokens"] > 20
    assert answer.read_text() == record["text"] + "\n"
    assert "tok/s" in err and ("(a recipe of 6 layers, " if "|" in kv else f"({kv}, ") in err


@pytest.mark.parametrize("model, spec", [("tiny-llama", "llama"), ("tiny-qwen", "qwen2")])
def test_without_a_spec_the_recommended_one_is_used_and_named(run, model, spec):
    best = recommend(spec).spec
    code, out, err = run("generate", "--model", str(TINY.parent / model), QUESTION, "-m", "2", "--json")
    assert code == 0, err
    assert f"KV spec {best}, recommended for {spec} models: " in err
    assert json.loads(out.splitlines()[-1])["kv"] == str(best)


def test_a_spec_below_the_recommended_one_is_warned_about(run):
    code, _, err = run("generate", "--model", str(TINY), "--kv", "int2", QUESTION, "-m", "2")
    assert code == 0 and "--kv int2 keeps fewer bits of keys and values than" in err
    code, _, err = run("generate", "--model", str(TINY), "--kv", "int8", QUESTION, "-m", "2")
    assert code == 0 and "recommended" not in err


def test_mlx_lm_generates_the_same_text(run):
    """The same words through the command and through plain mlx_lm after opentq.compress."""
    import mlx_lm

    import opentq
    from opentq.hosts.mlx_lm.generate import encode_prompt

    code, out, err = run("generate", "--model", str(TINY), "--kv", "int4", QUESTION, "-m", "16", "--json")
    assert code == 0, err
    model, tokenizer = opentq.load(str(TINY))
    opentq.compress(model, "int4")
    text = mlx_lm.generate(model, tokenizer, prompt=encode_prompt(tokenizer, QUESTION), max_tokens=16)
    assert text == json.loads(out.splitlines()[-1])["text"]
    rows = opentq.report(model).rows
    assert rows and all(row.calls > 0 for row in rows if row.plan.compressed)


def test_two_processes_give_the_text_of_one(run):
    """Tensor-parallel over the loopback ring, a compressed cache on each rank."""
    arguments = ["generate", QUESTION, "--model", str(TINY), "--kv", "int4", "-m", "8"]
    code, alone, _ = run(*arguments)
    launch = [str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "--backend", "ring"]
    pair = [*launch, sys.executable, "-m", "opentq", *arguments]
    together = subprocess.run(pair, capture_output=True, text=True, check=True)
    assert code == 0 and "48213" in alone and together.stdout == alone


def test_a_draft_model_with_windows_is_refused(run):
    gemma = str(TINY.parent / "tiny-gemma")
    code, _, err = run("generate", "--model", str(TINY), "--draft-model", gemma, "hello")
    assert code == 2 and "RotatingKVCache" in err and "without --draft-model" in err


def model_copy(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    return folder


def no_weights(tmp_path):
    folder = model_copy(tmp_path)
    (folder / "model.safetensors").unlink()
    return folder


def half_downloaded(tmp_path):
    folder = model_copy(tmp_path)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def cut_weights(tmp_path):
    folder = model_copy(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    return folder


def not_a_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    return tmp_path


def unsupported(tmp_path):
    folder = model_copy(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "abacus"}))
    return folder


def damaged_config(tmp_path):
    folder = model_copy(tmp_path)
    (folder / "config.json").write_text('{"model_type": ')
    return folder


@pytest.mark.parametrize(
    "make, words",
    [
        (no_weights, "no weights"),
        (half_downloaded, "lacks model-00002-of-00002.safetensors"),
        (cut_weights, "download"),
        (not_a_model, "not a model folder"),
        (unsupported, "abacus not supported"),
        (damaged_config, "damaged"),
        (lambda p: p / "missing", "does not exist"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_bad_models(run, tmp_path, make, words):
    code, out, err = run("generate", "--model", str(make(tmp_path)), "hello")
    assert code == 2 and words in err and err.count("\n") == 1 and not out, err


@pytest.mark.parametrize(
    "args, words",
    [
        (["--kv", "nonsense", "hello"], "unknown codec 'nonsense'"),
        (["--kv", "int4:g48", "hello"], "g48"),
        (["--kv", "int4", "--kv-bits", "4", "hello"], "not both"),
        ([""], "the prompt is empty"),
        (["--prompt-file", "/nonexistent/prompt"], "can't read the prompt file"),
        (["--prompt", "a", "b"], "once"),
        (["hello", "--max-context", "5"], "--max-context 5"),
        (["hello", "-o", "/nonexistent/out.txt"], "can't be written"),
    ],
)
def test_bad_input(run, args, words):
    code, _, err = run("generate", "--model", str(TINY), *args)
    assert code == 2 and words in err and err.count("\n") == 1, err


def test_doctor_finds_a_working_machine(run):
    code, out, _ = run("doctor", "--json")
    checks = {c["name"]: c for c in json.loads(out)}
    assert code == 0 and checks["seam with mlx-lm"]["state"] == "ok" and checks["conformance tiled"]["state"] == "ok"


def test_the_demo_needs_a_model(run, monkeypatch, tmp_path):
    from opentq.cli import demo

    monkeypatch.setattr(demo, "__file__", str(tmp_path / "a" / "b" / "c" / "demo.py"))
    monkeypatch.chdir(tmp_path)
    code, _, err = run("demo")
    assert code == 2 and "models/tiny-llama was not found" in err


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    """MLX compiles into the temporary folder and says what the compiler said, in pages of C++."""
    words = "[Compile::eval_cpu] Failed to compile function Cf4: error closing /t/c.s: No space left on device"
    for error in (RuntimeError(words), OSError(errno.ENOSPC, "No space left on device")):
        monkeypatch.setattr(cli, "app", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1 and "the disk is full" in said
    monkeypatch.setattr(cli, "app", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        cli.main()


def test_sigterm_ends_long_work_even_where_a_parent_ignores_it():
    work = (
        "import sys; from opentq.cli import main; main.app = lambda *_, **__: print(sum(range(10**12)), flush=True); "
    )
    script = f"trap '' TERM; exec {sys.executable} -c '{work} print(1, flush=True); main.main()'"
    process = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "1\n"
    time.sleep(0.5)
    process.terminate()
    assert process.wait(5) == -signal.SIGTERM


def test_chat_needs_no_mlx_vlm_for_text():
    """`make demo` installs none."""
    code = "import sys; sys.modules['mlx_vlm'] = None; from opentq.__main__ import main; main()"
    command = [sys.executable, "-c", code, "chat", str(TINY), "-m", "4"]
    done = subprocess.run(command, input="hello\n", capture_output=True, text=True, timeout=120)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False) and done.stdout.strip(), done.stderr
