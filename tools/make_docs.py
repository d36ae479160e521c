#!/usr/bin/env python3
"""Writes the documents that follow from kvartz-vmm's own tables: make_docs.py PROGRAM [--check]

  docs/kvartz-vmm.1    the man page, from -help
  docs/devices.md      the devices, from -device help
  docs/kvartz-img.1, -io.1, -nbd.1   the man pages of the tools, from --help of the kvartz beside PROGRAM

--check writes nothing and fails when a document is not what would be written.
"""

import os
import re
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

MAN_HEAD = r""".TH KVARTZ-VMM 1 "" "Kvartz {version}" "Kvartz"
.SH NAME
kvartz-vmm \- run a virtual machine
.SH SYNOPSIS
.B kvartz-vmm
.RI [ option ...]
.SH DESCRIPTION
Runs one x86-64 virtual machine until its guest powers off or somebody ends it.
Options, device names, the monitor and QMP are spelled as QEMU spells them.
What is not known or not supported is refused by name before anything runs.
.PP
The engine is KVM where the host offers one that is fit to run a guest, and otherwise an x86-64 engine of our own; the first
line of output says which, and why.
.SH OPTIONS
"""

MAN_TAIL = r""".SH CONSOLE KEYS
On a console that is shared with the monitor
.RB ( \-nographic ,
.BR "\-serial mon:stdio" ):
.TP
.B Ctrl-a h
show the keys
.TP
.B Ctrl-a x
end the machine
.TP
.B Ctrl-a c
switch between console and monitor
.TP
.B Ctrl-a Ctrl-a
send Ctrl-a
.SH EXIT STATUS
0 when the guest powered off or somebody ended the machine; 1 when it could not start or cannot go on; what the guest wrote
to an isa-debug-exit device, as 2*value+1, when it did that.
.SH EXAMPLES
.nf
kvartz-vmm -m 512 -nographic -kernel vmlinuz -initrd initrd.img -append console=ttyS0
kvartz-vmm -M pc -m 1G -smp 2 -drive file=disk.img,format=raw,if=virtio -nic user,hostfwd=tcp::2222-:22 -nographic
.fi
"""


def output(program, *arguments):
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def parse_options(text):
    """(option, argument, help) of each "  -option ARGUMENT   help" of -help; the help may stand on the next line."""
    rows = []
    for line in text.splitlines():
        if match := re.match(r"  -(\S+)(?: (\S.*?))?(?:\s{2,}(\S.*))?$", line):
            rows.append([match[1], match[2] or "", match[3] or ""])
        elif rows and not rows[-1][2] and line.startswith(" " * 20):
            rows[-1][2] = line.strip()
    return rows


def roff(text):
    text = text.replace("\\", r"\e").replace("-", r"\-")
    return "\\&" + text if text.startswith((".", "'")) else text


def man_page(program):
    version = re.search(r"version (\S+)", output(program, "-version"))[1]
    text = MAN_HEAD.format(version=version)
    for option, argument, help_text in parse_options(output(program, "-help")):
        text += f".TP\n.B \\-{roff(option)}\n" if not argument else f'.TP\n.BI \\-{roff(option)} " {roff(argument)}"\n'
        text += roff(help_text) + "\n"
    return text + MAN_TAIL


def devices(program):
    rows = re.findall(r'^name "([^"]+)", bus (\S*), desc "(.*)"$', output(program, "-device", "help"), re.M)
    if not rows:
        sys.exit("make_docs: -device help lists nothing")
    table = "".join(f"| `{name}` | {bus} | {description} |\n" for name, bus, description in rows)
    return ("# Devices\n\nWhat `-device` takes; `-device NAME,help` lists a device's properties. Made from `-device help` by "
            "tools/make_docs.py.\n\n| device | bus | what it is |\n|---|---|---|\n" + table)


TOOLS = {
    "img": ("make, examine, convert and repair disk images",
            "Commands, options, output and exit codes are those of qemu-img 7.2, and called by that name the program answers as it.\n"
            "What is not supported yet is refused by name.\n.PP\n"
            "SIGUSR1 makes a command that works on an image print its progress.\n.PP\n"
            "With\n.B \\-\\-json\nbefore the command errors are JSON objects, one a line.\n",
            "0 success; 1 an error. compare: 1 different, 2 an image cannot be opened, 3 its allocation cannot be examined, 4 it\n"
            "cannot be read. check: 2 corruptions, 3 leaked clusters alone, 63 the format has no checks.\n"),
    "io": ("read and write a disk image by commands",
           "Options, commands, output and exit codes are those of qemu-io 7.2, and called by that name the program answers as it.\n"
           "Commands come from\n.B \\-c\nor, one a line, from standard input. What is not supported yet is refused by name.\n",
           "0 when every command did what it should; 1 when one failed, a pattern was not what was read, or no image could be opened.\n"),
    "nbd": ("offer a disk image to NBD clients",
            "Options are those of qemu-nbd 7.2, and called by that name the program answers as it.\n"
            "It ends when its last client has gone, unless it is persistent.\n",
            "0 when it ended as asked; 1 when it could not serve.\n"),
}


def tool_options(text):
    """Rows of "  -f FMT, --format   help"."""
    page = ""
    for match in re.finditer(r"^  (-.{29}\S*) +(\S.*)$", text, re.M):
        page += f".TP\n.B {roff(match[1].strip())}\n{roff(match[2])}\n"
    return page


def tool_page(program, tool):
    kvartz = os.path.join(os.path.dirname(os.path.abspath(program)), "kvartz")
    summary, description, status = TOOLS[tool]
    text = output(kvartz, tool, "--help")
    page = (f'.TH KVARTZ-{tool.upper()} 1 "" "Kvartz" "Kvartz"\n.SH NAME\nkvartz-{tool} \\- {summary}\n.SH SYNOPSIS\n'
            f".B kvartz {tool}\n{roff(text.splitlines()[0].split(tool, 1)[1].strip())}\n.SH DESCRIPTION\n{description}"
            f".SH OPTIONS\n{tool_options(text)}")
    verbs = re.findall(r"^  ([a-z]+) \[", text, re.M) if tool == "img" else []
    for verb in verbs:
        lines = output(kvartz, tool, verb, "--help").splitlines()
        page += f".SH {verb.upper()}\n.B {roff(lines[0].removeprefix('usage: '))}\n.PP\n{roff(lines[1])}\n" + tool_options("\n".join(lines[2:]))
    if tool == "io":
        page += ".SH COMMANDS\n"
        for line in output(kvartz, tool, "-c", "help").splitlines():
            if match := re.match(r"(\S+)( .*)?-- (.*)", line):
                page += f".TP\n.B {roff((match[1] + (match[2] or '')).strip())}\n{roff(match[3])}\n"
                page += tool_options(output(kvartz, tool, "-c", f"help {match[1]}"))
    return page + f".SH EXIT STATUS\n{status}"


def main():
    arguments = [a for a in sys.argv[1:] if a != "--check"]
    if len(arguments) != 1:
        sys.exit(__doc__)
    stale = []
    for path, text in (("docs/kvartz-vmm.1", man_page(arguments[0])), ("docs/devices.md", devices(arguments[0])),
                       ("docs/kvartz-img.1", tool_page(arguments[0], "img")), ("docs/kvartz-io.1", tool_page(arguments[0], "io")),
                       ("docs/kvartz-nbd.1", tool_page(arguments[0], "nbd"))):
        full = os.path.join(ROOT, path)
        old = ""
        if os.path.exists(full):
            with open(full, encoding="utf-8") as file:
                old = file.read()
        if old == text:
            continue
        stale.append(path)
        if "--check" not in sys.argv:
            with open(full, "w", encoding="utf-8") as file:
                file.write(text)
    if stale and "--check" in sys.argv:
        sys.exit(f"make_docs: {' and '.join(stale)} is not up to date; run ./dev fix, then commit")


if __name__ == "__main__":
    main()
