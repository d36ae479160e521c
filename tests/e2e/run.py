#!/usr/bin/env python3
"""Runs end-to-end tests: run.py [--vmm PROGRAM] [--list] [NAME... | slow]

Each drives a real VMM process with real kernels and firmware. PROGRAM is kvartz-vmm of build/dev unless told otherwise,
here or by KVARTZ_VMM; with qemu-system-x86_64 the tests can be checked against the peer. Without a name all but the slow
ones run. --list prints what ctest needs to know of each.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
sys.path.insert(0, HERE)
SKIPPED = 77  # what ctest takes for a skip

import harness  # noqa: E402


def load_tests():
    for name in sorted(os.listdir(HERE)):
        if name.endswith("_test.py"):
            __import__(name[:-3])
    return harness.TESTS


def guests():
    build = subprocess.run([os.path.join(ROOT, "tests/guest/build.sh")], stdout=subprocess.PIPE, text=True, check=True)
    return build.stdout.strip()


def run(name, function, vmm, guest):
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kvartz-e2e-") as directory:
        context = harness.Context(vmm, guest, directory)
        try:
            function(context)
            result = "ok"
        except harness.Skip as skip:
            result = f"SKIPPED: {skip}"
        except harness.Failure as failure:
            result = f"FAILED: {failure}"
        except Exception:  # a fault of the test itself: shown, and the others still run
            result = f"FAILED: {traceback.format_exc()}"
        finally:
            context.close()
    print(f"{name}: {result} ({time.monotonic() - started:.1f} s)", flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmm", default=os.environ.get("KVARTZ_VMM", os.path.join(ROOT, "build/dev/bin/kvartz-vmm")))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    tests = load_tests()
    if arguments.list:
        print("\n".join(f"{name} {t.seconds} {t.cpus}" for name, t in tests.items() if not t.slow))
        return 0
    names = arguments.names or [name for name, t in tests.items() if not t.slow]
    if names == ["slow"]:
        names = [name for name, t in tests.items() if t.slow]
    unknown = [name for name in names if name not in tests]
    if unknown:
        sys.exit(f"run.py: no test '{unknown[0]}'; there are: {' '.join(tests)}")
    guest = guests()
    results = [run(name, tests[name], arguments.vmm, guest) for name in names]
    if any(result.startswith("FAILED") for result in results):
        return 1
    return SKIPPED if all(result.startswith("SKIPPED") for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
