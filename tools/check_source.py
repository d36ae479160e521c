#!/usr/bin/env python3
"""Holds the source to the rules of the house that a compiler does not know. Prints one line a fault; exits 1 on any.

  layers    an #include names only rooms that layers.txt allows
  headers   every header compiles alone: x.cpp includes x.h before anything else, and a header without a source file is
            compiled by itself
  wording   nothing that a reader elsewhere cannot follow, and no construct that the house does without (table RULES)
"""

import concurrent.futures
import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

ANYWHERE = r"^(?!tools/check_source\.py)"
CODE = r"^(src|tests|bench)/.*\.(h|cpp|S|def)$"
OURS = r"^src/.*\.(h|cpp)$"
OUTSIDE_BASE = r"^src/(?!base/).*\.(h|cpp)$"
TESTS = r"^tests/.*\.(h|cpp)$"

# Where (a pattern of paths), what (a pattern within a line, with or without its comment), why it is a fault.
RULES = [
    (ANYWHERE, "text", r"(^|[^\w.])/work/", "a path of one machine"),
    (ANYWHERE, "text", r"\b[Ii]ssue #?\d", "an issue's number: say what it is about"),
    (CODE, "text", r"\b(TODO|FIXME|XXX)\b", "do it, or refuse it with a clear error"),
    (CODE, "code", r"#\s*include\s*<(format|print|coroutine)>", "g++ 12 lacks it; use fmt"),
    (CODE, "code", r"\bco_(await|return|yield)\b", "coroutines are not used"),
    (OUTSIDE_BASE, "code", r"\bstd::((shared_|recursive_)?mutex|(lock|unique|scoped)_lock|lock_guard|condition_variable)\b",
     "use base/sync.h"),
    (OUTSIDE_BASE, "code", r"\bstd::j?thread\b(?!::)", "use the threads of base/"),
    (OUTSIDE_BASE, "code", r"\b(sleep_for|sleep_until|usleep|nanosleep)\s*\(", "wait for the event"),
    (TESTS, "code", r"\b(sleep_for|sleep_until|usleep|nanosleep|sleep)\s*\(", "wait for the event"),
    (OURS, "code", r"(^|[^\w])throw\b\s*[\w:;]", "nothing of ours throws; return a Result"),
    (OURS, "code", r"(^|[^\w_])assert\s*\(", "use VERIFY, which is always on"),
]


def tracked_files():
    listing = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                             capture_output=True, text=True, check=True).stdout
    return [f for f in listing.splitlines() if os.path.isfile(os.path.join(ROOT, f))]


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8", errors="replace") as file:
        return file.read()


def load_layers():
    layers = {}
    for line in read("layers.txt").splitlines():
        if line.strip() and not line.startswith("#"):
            room, _, below = line.partition(":")
            layers[room.strip()] = set(below.split()) | {room.strip()}
    return layers


def includes(text):
    return [(number, name) for number, line in enumerate(text.splitlines(), 1)
            for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', line)]


def check_layers(files):
    layers = load_layers()
    for path in files:
        match = re.match(r"src/([^/]+)/.*\.(h|cpp|inc|def)$", path)
        if not match:
            continue
        room = match[1]
        if room not in layers:
            yield f"{path}: room '{room}' is not in layers.txt"
            continue
        for number, name in includes(read(path)):
            target = name.split("/")[0]
            if target not in layers or not os.path.exists(os.path.join(ROOT, "src", name)):
                yield f'{path}:{number}: "{name}" is not a path below src/'
            elif target not in layers[room]:
                yield f"{path}:{number}: {room} may not include {target} (layers.txt)"


def compile_alone(header):
    command = [os.environ.get("CXX", "g++"), "-std=c++23", "-fsyntax-only", "-Isrc", "-Itests", "-x", "c++", "-w",
               "-include", header, "/dev/null"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode == 0:
        return []
    first = next((line for line in result.stderr.splitlines() if "error" in line), "does not compile")
    return [f"{header}: does not compile alone: {first}"]


def check_headers(files):
    alone = []
    for header in (f for f in files if re.match(r"(src|tests)/.*\.h$", f)):
        source = header[:-2] + ".cpp"
        if source not in files:
            alone.append(header)
            continue
        own = header.split("/", 1)[1]
        first = next(iter(includes(read(source))), (0, ""))[1]
        if first != own:
            yield f'{source}: includes "{first}" before its own header "{own}"'
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for faults in pool.map(compile_alone, alone):
            yield from faults


def check_wording(files):
    for path in files:
        rules = [(part, re.compile(what), why) for where, part, what, why in RULES if re.search(where, path)]
        for number, line in enumerate(read(path).splitlines(), 1):
            parts = {"text": line, "code": re.sub(r"//.*", "", line)}
            for part, what, why in rules:
                if what.search(parts[part]):
                    yield f"{path}:{number}: {why}: {line.strip()[:80]}"


def main():
    files = tracked_files()
    faults = [fault for check in (check_layers, check_headers, check_wording) for fault in check(files)]
    print("\n".join(faults) if faults else "check_source: all is well")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
