"""Disks for tests: images made and examined by the peer's tools, machines with a QMP client, guests that take commands."""

import hashlib
import os
import subprocess
import time

from harness import Failure, Qmp, Skip, expect_equal

MIB = 1 << 20


def tool(*arguments, ok=(0,)):
    """Runs one of the peer's tools; returns what it printed."""
    try:
        run = subprocess.run(arguments, capture_output=True, text=True)
    except FileNotFoundError:
        raise Skip(f"{arguments[0]} is not installed") from None
    if run.returncode not in ok:
        raise Failure(f"{' '.join(arguments)}: exit code {run.returncode}\n{run.stdout}{run.stderr}")
    return run.stdout


def create(context, name, size=None, backing=None, form="qcow2"):
    path = context.path(name)
    arguments = ["qemu-img", "create", "-q", "-f", form]
    if backing:
        arguments += ["-b", backing, "-F", "qcow2"]
    tool(*arguments, path, *([str(size)] if size else []))
    return path


def contents(path, form="qcow2"):
    """The MD5 of what a guest sees of an image."""
    tool("qemu-img", "convert", "-f", form, "-O", "raw", path, path + ".raw")
    with open(path + ".raw", "rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    os.unlink(path + ".raw")
    return digest


def check(path):
    tool("qemu-img", "check", "-q", path)


def chain(context, size):
    """Three images on each other, each with something of its own; returns the topmost."""
    path = create(context, "base.qcow2", size)
    tool("qemu-io", "-c", "write -q -P 1 0 16M", path)
    path = create(context, "middle.qcow2", backing=path)
    tool("qemu-io", "-c", "write -q -P 2 8M 12M", "-c", "write -q -z 9M 1M", path)
    path = create(context, "top.qcow2", backing=path)
    tool("qemu-io", "-c", "write -q -P 3 18M 6M", path)
    return path


def start(context, *arguments):
    path = context.path("qmp")
    vm = context.start("-m", "256", "-nic", "none", "-qmp", f"unix:{path},server=on,wait=off", *arguments)
    qmp = Qmp(vm, path, seconds=120)
    qmp.call("qmp_capabilities")
    return vm, qmp


def disk(path, *properties, node="d"):
    return ["-blockdev", f"driver=qcow2,node-name={node},discard=unmap,file.driver=file,file.filename={path}", "-device",
            ",".join(["virtio-blk-pci", f"drive={node}", "id=vd", *properties])]


def job_event(qmp, name, job):
    """Waits for an event of one job."""
    data = qmp.event(name)
    expect_equal(data["device"], job, f"the job of {name}")
    if data.get("error"):
        raise Failure(f"job {job}: {data['error']}")
    return data


def add_image(qmp, node, path):
    qmp.call("blockdev-add", **{"driver": "qcow2", "node-name": node, "file": {"driver": "file", "filename": path}})


def finish_job(qmp, job):
    """Of jobs that stay until they are dismissed."""
    while True:
        state = next(row for row in qmp.call("query-jobs") if row["id"] == job)
        if state["status"] == "concluded":
            break
        qmp.event("JOB_STATUS_CHANGE")
    if state.get("error"):
        raise Failure(f"job {job}: {state['error']}")
    qmp.call("job-dismiss", id=job)


def make_image(qmp, node, path, size):
    """As management programs do: a file, a node on it, a format on that, and the format's node."""
    qmp.call("blockdev-create", **{"job-id": "file", "options": {"driver": "file", "filename": path, "size": 0}})
    finish_job(qmp, "file")
    qmp.call("blockdev-add", **{"driver": "file", "node-name": node + "-file", "filename": path})
    qmp.call("blockdev-create", **{"job-id": "format", "options": {
        "driver": "qcow2", "file": node + "-file", "size": size, "version": "v3", "cluster-size": 65536}})
    finish_job(qmp, "format")
    qmp.call("blockdev-add", **{"driver": "qcow2", "node-name": node, "file": node + "-file"})


def run_to_ready(qmp, job):
    job_event(qmp, "BLOCK_JOB_READY", job)
    qmp.call("block-job-complete", device=job)
    job_event(qmp, "BLOCK_JOB_COMPLETED", job)


def disk_row(qmp):
    """The disk's row of query-block: others have drives by default."""
    return next(row for row in qmp.call("query-block") if "/vd/" in row.get("qdev", ""))


def inserted(qmp):
    return disk_row(qmp)["inserted"]


def load_goes_on(vm, operations=0):
    """Waits until the load tells that it has done more, at least so much of it."""
    while True:
        state = vm.expect(r"^load: (?:(\d+) operations|FAILED.*)\n")
        if not state[1]:
            raise Failure(f"{state[0]}; {vm.tail()}")
        if int(state[1]) >= operations:
            return


def load_ends(vm):
    """Waits until the load has read everything back."""
    while "verified" not in (state := vm.expect(r"^load: .*\n")[0]):
        if "FAILED" in state:
            raise Failure(f"{state}; {vm.tail()}")


WAIT_FOR_DISK = "while [ ! -e /dev/vda ]; do usleep 100000; done; "


def contents_of_chain(path):
    # Another process has the images open.
    tool("qemu-img", "convert", "-U", "-O", "raw", path, path + ".raw")
    with open(path + ".raw", "rb") as file:
        digest = hashlib.file_digest(file, "md5").hexdigest()
    os.unlink(path + ".raw")
    return digest


class Shell:
    """A guest's shell that runs one command a time."""
    COMMAND = "while read x; do eval $x; echo did $?; done"

    def __init__(self, vm):
        self._vm = vm
        vm.expect("^kvartz: userspace\n")

    def start(self, command):
        self._vm.send(command + "\n")

    def finish(self):
        """Waits for a command's end; returns what it printed. It must succeed."""
        begin = len(self._vm.output[:self._vm._seen])
        state = self._vm.expect(r"^did (\d+)\n")[1]
        printed = self._vm.output[begin:self._vm._seen]
        if state != "0":
            raise Failure(f"the guest's command failed ({state}): {printed}")
        return printed

    def run(self, command):
        self.start(command)
        return self.finish()

    def digest(self, device):
        """The MD5 of what is on a device."""
        return self.run(f"blockdev --flushbufs {device}; md5sum {device}").split("\n")[-3].split()[0]


def allocated(path):
    """Bytes that a file takes."""
    return os.stat(path).st_blocks * 512


def operations_done(qmp, device):
    """Requests of a device that count for its limits."""
    stats = next(row["stats"] for row in qmp.call("query-blockstats") if f"/{device}/" in row.get("qdev", ""))
    return stats["rd_operations"] + stats["wr_operations"]


def measured_iops(vm, qmp, device, seconds=4):
    """Requests a second while a load runs."""
    load_goes_on(vm)
    vm.runs_until(time.monotonic() + 1)  # the burst that a limit allows at first
    begin, before = time.monotonic(), operations_done(qmp, device)
    vm.runs_until(begin + seconds)
    return (operations_done(qmp, device) - before) / (time.monotonic() - begin)
