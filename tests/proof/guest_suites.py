#!/usr/bin/env python3
"""Real programs in a guest under Kvartz's own engine, and the same ones natively: both must print the same.

  ./dev guest-suites [--only cxx,python,...] [--cpus N] [-- VMM OPTION...]

The userland is the same root file system (tests/proof/build.sh), as the guest's disk or as a chroot, so root is needed.
A line a suite: lines that were compared, seconds in the guest and natively. Exits with 1 if a suite failed in the guest or
printed something else; build/proof/suites.json has what each printed, build/proof/suites-guest.log and -native.log all that came, as it came."""

import argparse
import json
import os
import subprocess
import sys

import proof

SUITES = ("cxx", "python", "openssl", "openssl_tests", "sqlite", "node", "luajit")
SILENCE_S = 1800
GUEST_MIB = 3072


class Record:
    """What one side printed."""

    def __init__(self):
        self.suites, self.done, self.last = {}, False, []

    def line(self, text):
        self.last = (self.last + [text])[-20:]
        kind, _, rest = text.partition(" ")
        name, _, words = rest.partition(" ")
        if kind == "@go":
            self.suites[name] = {"lines": [], "details": [], "status": None, "seconds": None}
        elif kind == "@out":
            self.suites[name]["lines"].append(words)
        elif kind == "@err":
            self.suites[name]["details"].append(words)
        elif kind == "@end":
            status, seconds = words.split()
            self.suites[name].update(status=int(status), seconds=float(seconds))
        elif kind == "@done":
            self.done = True


def run(command, what):
    record = Record()
    with open(proof.built(f"suites-{what}.log"), "w", encoding="utf-8", buffering=1) as log:

        def take(line):
            print(line, file=log)
            record.line(line)

        ended = proof.follow(command, take, SILENCE_S)
    if not record.done:
        print(f"{what}: {ended}; the last lines:", *record.last, sep="\n  ", file=sys.stderr)
    return record


def differences(guest, native):
    lines = [f"guest: {line}" for line in guest["lines"] if line not in native["lines"]]
    lines += [f"native: {line}" for line in native["lines"] if line not in guest["lines"]]
    return lines or ["the same lines in another order"]


def report(name, guest, native):
    """Prints a suite's line; True if it held."""
    guest, native = guest.suites.get(name), native.suites.get(name)
    if not guest or guest["status"] is None:
        print(f"{name:14} FAILED: it did not end in the guest")
        return False
    faults = []
    if not native or native["status"] is None:
        faults.append("it did not end natively")
    elif native["lines"] != guest["lines"]:
        faults.append("prints something else than natively")
    if guest["status"] != 0:
        faults.append(f"status {guest['status']} in the guest, {native and native['status']} natively")
    native_s = native["seconds"] if native and native["seconds"] else float("nan")
    print(f"{name:14} {'FAILED: ' + '; '.join(faults) if faults else 'ok'}: {len(guest['lines'])} lines, guest "
          f"{guest['seconds']:.1f} s, native {native_s:.1f} s, {guest['seconds'] / native_s:.2f} times", flush=True)
    if faults:
        print(*(differences(guest, native)[:20] if native else []), *guest["details"], sep="\n    ")
    return not faults


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vmm", required=True)
    parser.add_argument("--only", default=",".join(SUITES), help="suites, with commas between them")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--python", help="modules of Python's tests, with commas between them, instead of all")
    parser.add_argument("options", nargs="*", help="more options of the VMM")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        sys.exit(f"guest-suites: no suite '{unknown[0]}'; there are: {' '.join(SUITES)}")
    proof.build()
    words = ["PROOF=suites.sh", f"PROOF_SUITES={','.join(names)}"]
    words += [f"PROOF_PYTHON={arguments.python}"] if arguments.python else []
    native = run(proof.native_command(words), "native")
    command = proof.guest_command(arguments.vmm, words, cpus=arguments.cpus, memory_mib=GUEST_MIB)
    guest = run(command + arguments.options, "guest")
    with open(proof.built("suites.json"), "w", encoding="utf-8") as file:
        json.dump({"guest": guest.suites, "native": native.suites}, file, indent=1)
    held = [report(name, guest, native) for name in names]
    return 0 if all(held) and guest.done else 1


if __name__ == "__main__":
    sys.exit(main())
