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

    def __init__(self, home, *args):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
        environment = os.environ | {"HOME": str(home), "XDG_CACHE_HOME": CACHE, "PROMPT_TOOLKIT_NO_CPR": "1"}
        environment |= {"TERM": "xterm", "NO_COLOR": "1"}
        command = [sys.executable, "-m", "opentq", "chat", str(MODEL), "--kv", "int4", *args]

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
    opened = []

    def start(*args):
        opened.append(Terminal(tmp_path, *args))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


COST = r"tokens · [\d.]+ tok/s · ctx (\S+)/8\.7k · KV .*\n"
PROMPT = ">>>"


def test_a_session(terminal, tmp_path):
    """Pastes, completion, settings, history: one program, because it takes seconds to start."""
    history = tmp_path / ".cache" / "opentq" / "chat_history"
    history.parent.mkdir(parents=True)
    history.write_text("from readline\n")
    t = terminal("--max-tokens", "3")
    t.until(PROMPT)

    # A paste of several lines is one message, with one answer.
    t.send(paste("one\rtwo\nthree"))
    t.until("three")
    t.send(ENTER)
    t.until(COST)
    t.until(PROMPT)
    t.send(f"/save {tmp_path}/talk.json{ENTER}")
    t.until("saved 2 messages")
    assert '"one\\ntwo\\nthree"' in (tmp_path / "talk.json").read_text()
    t.until(PROMPT)

    # So are the lines between two """, and Alt-Enter begins another line.
    for keys in (f'"""a{ENTER}b"""', "a\033\rb"):
        t.send(keys)
        t.until("b")
        t.send(ENTER)
        t.until(COST)
        t.until(PROMPT)

    # A setting alone is shown; names complete, and so do files.
    t.send(f"/set temp .5{ENTER}")
    t.until(PROMPT)
    t.send(f"/set te{TAB}{ENTER}")
    t.until("temperature: 0.5")
    t.until(PROMPT)
    t.send(f"/loa{TAB} {tmp_path}/ta{TAB}{ENTER}")
    t.until("loaded 2 messages")
    t.until(PROMPT)

    # History is written as it is made; what readline left is older.
    assert "+/set temp .5" in history.read_text() and history.read_text().startswith("from readline\n")
    t.send(UP * 12 + ENTER)  # through every line of the messages of several
    assert "from readline" in t.until(COST)
    t.until(PROMPT)
    t.send("caf\udcff" + ENTER)
    t.until("the message is not UTF-8 text")
    t.until(PROMPT)
    t.send(CTRL_C)
    t.until("Ctrl-D or /bye leaves")
    t.until(PROMPT)
    t.send(CTRL_D)
    assert t.end() == 0


def test_ctrl_c_and_what_is_typed_during_an_answer(terminal):
    t = terminal()
    t.send("imp" + ENTER)  # while the model loads
    t.until(r">>>\s*imp")
    t.send("ort" + ENTER)
    t.until(r"\n.*\w")  # the answer has begun

    # Neither shown nor sent, but in the next line to be edited.
    t.send(f"typed{ENTER}meanwhile")
    t.send(paste("pasted\rtoo"))
    time.sleep(0.5)
    t.send(CTRL_C)
    answer = t.until(r"\(stopped\)")
    assert "meanwhile" not in answer and "pasted" not in answer
    held = int(re.search(COST, t.until(COST))[1])
    assert held > 5
    t.until(r">>>\s*typed\n.*meanwhilepasted\n.*too")

    # The next turn reads what is new.
    t.send(CTRL_C)
    t.until(PROMPT)
    t.send(f"/set max_tokens 2{ENTER}")
    t.until(PROMPT)
    t.send("more" + ENTER)
    t.until(COST)
    t.until(PROMPT)
    t.send("/stats" + ENTER)
    read = int(re.search(r"read (\d+) tokens", t.until(r"last .*\n"))[1])
    assert 0 < read < 30
    t.until(PROMPT)

    # While the prompt is read: the message is taken back, and what was read is kept.
    t.send(paste("word " * 3000))
    t.until("word word")
    t.send(ENTER)
    t.until(r"reading \d+ of \d+ tokens")
    t.send(CTRL_C)
    t.until("the message is taken back")
    assert t.until(COST)
    t.until(PROMPT)

    # Ctrl-D is heeded when the answer is over.
    t.send(f"/set max_tokens 30{ENTER}")
    t.until(PROMPT)
    t.send("more" + ENTER)
    t.until(r"\n.*\w")
    t.send(CTRL_D)
    assert t.end() == 0 and "30 tokens" in t.screen
