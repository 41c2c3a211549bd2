"""`opentq chat` in a pseudo-terminal, as a person meets it: keys in, what is on the screen out."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

MODEL = Path(__file__).parents[1] / "models" / "tiny-llama"
CACHE = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
ENTER, TAB, UP, CTRL_C, CTRL_D = "\r", "\t", "\033[A", "\003", "\004"


def paste(text):
    return f"\033[200~{text}\033[201~"


class Terminal:
    """A program in a pseudo-terminal, 100 columns wide."""

    def __init__(self, home):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        environment = os.environ | {"HOME": str(home), "XDG_CACHE_HOME": CACHE, "PROMPT_TOOLKIT_NO_CPR": "1"}
        environment |= {"TERM": "xterm", "NO_COLOR": "1"}
        command = [sys.executable, "-m", "opentq", "chat", str(MODEL), "--kv", "int4"]

        def own_terminal():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, preexec_fn=own_terminal
        )
        os.close(slave)
        self.screen = ""

    def send(self, keys):
        os.write(self.master, keys.encode("utf-8", "surrogateescape"))

    def until(self, text, seconds=45):
        """What came up to `text`, a pattern, without escape codes; the rest is for the next call."""
        end = time.monotonic() + seconds
        while not (found := re.search(text, self.screen)):
            assert time.monotonic() < end, f"no {text!r} in {self.screen!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    data = os.read(self.master, 1 << 16).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"ended without {text!r}: {self.screen!r}") from None
                self.screen = re.sub(r"\033\[[0-9;?]*[a-zA-Z]|\r", "", self.screen + data)
        before, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return before

    def end(self, seconds=60):
        with contextlib.suppress(OSError):
            while select.select([self.master], [], [], seconds)[0] and (data := os.read(self.master, 1 << 16)):
                self.screen += data.decode(errors="replace")
        return self.process.wait(seconds)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path):
    opened = Terminal(tmp_path)
    yield opened
    opened.close()


COST = r"tokens · [\d.]+ tok/s · ctx (\S+)/8\.7k · KV .*\n"
PROMPT = ">>>"


def test_a_session(terminal, tmp_path):
    """All in one program, because it takes seconds to start."""
    history = tmp_path / ".cache" / "opentq" / "chat_history"
    history.parent.mkdir(parents=True)
    history.write_text("from readline\n")
    t = terminal

    def ask(keys, shown=COST):
        """Keys, Enter, and what comes until the next prompt."""
        t.send(keys + ENTER)
        found = t.until(shown)
        t.until(PROMPT)
        return found

    # What is typed while the model loads or writes is neither shown nor sent, but in the next line to be edited.
    t.send("imp" + ENTER)
    t.until(r">>>\s*imp")
    t.send("ort" + ENTER)
    t.until(r"\n.*\w")  # the answer has begun
    t.send(f"typed{ENTER}meanwhile")
    t.send(paste("pasted\rtoo"))
    time.sleep(0.5)
    t.send(CTRL_C)
    answer = t.until(r"\(stopped\)")
    assert "meanwhile" not in answer and "pasted" not in answer
    held = int(re.search(COST, t.until(COST))[1])
    assert held > 5
    t.until(r">>>\s*typed\n.*meanwhilepasted\n.*too")

    # A stopped answer keeps its cache: the next turn reads what is new.
    t.send(CTRL_C)
    t.until("Ctrl-D or /bye leaves")
    t.until(PROMPT)
    ask("/set max_tokens 2", "2")
    assert int(re.search(COST, ask("more"))[1]) > held
    read = re.search(r"read (\d+) tokens", ask("/stats", r"last .*\n"))
    assert 0 < int(read[1]) < 30

    # Stopped while the prompt is read: the message is taken back.
    t.send(paste("word " * 3000))
    t.until("word word")
    t.send(ENTER)
    t.until(r"reading \d+ of \d+ tokens")
    t.send(CTRL_C)
    t.until("the message is taken back")
    t.until(COST)
    t.until(PROMPT)

    # A paste of several lines is one message; so are the lines between two """, and Alt-Enter begins another line.
    ask("/clear", "forgotten")
    t.send(paste("one\rtwo\nthree"))
    t.until("three")
    ask("")
    ask(f"/save {tmp_path}/talk.json", "saved 2 messages")
    assert '"one\\ntwo\\nthree"' in (tmp_path / "talk.json").read_text()
    for keys in (f'"""a{ENTER}b"""', "a\033\rb"):
        t.send(keys)
        t.until("b")
        ask("")

    # A setting alone is shown; names complete, and so do files.
    ask("/set temp .5", r"\.5")
    ask(f"/set te{TAB}", r"temperature: 0\.5")
    ask(f"/loa{TAB} {tmp_path}/ta{TAB}", "loaded 2 messages")

    # History is written as it is made; what readline left is older.
    kept = history.read_text()
    assert "+/set temp .5" in kept and kept.startswith("from readline\n")
    assert "from readline" in ask(UP * 30)
    ask("caf\udcff", "the message is not UTF-8 text")

    # Ctrl-D is heeded when the answer is over.
    ask("/set max_tokens 30", "30")
    t.send("more" + ENTER)
    t.until(r"\n.*\w")
    t.send(CTRL_D)
    assert t.end() == 0 and "30 tokens" in t.screen
