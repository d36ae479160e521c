"""What disks tell, commits by the human monitor, exports within TLS: on machines that stand still, or whose disk a thread of its
own serves."""

import json
import os
import subprocess

from disks import (MIB, Shell, WAIT_FOR_DISK, add_image, chain, check, contents, create, disk, inserted, job_event, load_ends,
                   start, tool)
from harness import Failure, expect_equal, test


def refused(qmp, command, **arguments):
    """Executes a command that must fail; returns the error's text."""
    answer = qmp.send_text(json.dumps({"execute": command, "arguments": arguments}))
    if "error" not in answer:
        raise Failure(f"{command} with {arguments} was not refused: {answer}")
    return answer["error"]["desc"]


def statistics_of(row):
    return sorted(name for name in row["stats"] if name != "idle_time_ns")


def serve(qmp, socket, node, **more):
    qmp.call("nbd-server-start", addr={"type": "unix", "data": {"path": socket}}, **more)
    qmp.call("block-export-add", **{"type": "nbd", "id": "e", "node-name": node, "name": "disk", "writable": True})


@test(seconds=120)
def disks_tell_of_their_writes_and_are_committed(context):
    base = create(context, "base.qcow2", 4 * MIB)
    tool("qemu-io", "-c", "write -q -P 1 0 4M", base)
    overlay = create(context, "overlay.qcow2", backing=base)
    tool("qemu-io", "-c", "write -q -P 2 1M 1M", overlay)
    low = create(context, "low.qcow2", 4 * MIB)
    written = create(context, "written.qcow2", 8 * MIB)
    vm, qmp = start(
        context, "-S", "-drive", f"file={overlay},format=qcow2,if=none,id=c", "-blockdev",
        f"driver=file,node-name=nf,filename={written},discard=unmap", "-blockdev", "driver=qcow2,node-name=n,file=nf,discard=unmap", "-blockdev",
        f"driver=qcow2,node-name=b,read-only=on,file.driver=file,file.node-name=bf,file.filename={low}", "-blockdev",
        f"driver=file,node-name=df,filename={create(context, 'vd.qcow2', backing=low)}", "-blockdev",
        "driver=qcow2,node-name=d,file=df,backing=b", "-device", "virtio-blk-pci,drive=d,id=vd", *context.kernel(""))

    # A device's row has those of the nodes below it; nodes tell of themselves.
    row = next(row for row in qmp.call("query-blockstats") if "/vd/" in row.get("qdev", ""))
    expect_equal((row["node-name"], row["parent"]["node-name"], row["backing"]["node-name"],
                  row["backing"]["parent"]["node-name"]), ("d", "df", "b", "bf"), "the nodes of query-blockstats")
    expect_equal(statistics_of(row["parent"]), statistics_of(row), "what is told of a node")
    expect_equal(row["stats"]["account_failed"], True, "account_failed of a device")

    socket = context.path("nbd")
    uri = f"nbd+unix:///disk?socket={socket}"
    serve(qmp, socket, "n")
    qmp.call("block-set-write-threshold", **{"node-name": "nf", "write-threshold": 2 * MIB})
    threshold = lambda: next(node["write_threshold"] for node in qmp.call("query-named-block-nodes") if node["node-name"] == "nf")
    expect_equal(threshold(), 2 * MIB, "the threshold")
    tool("qemu-io", "-f", "raw", "-c", "write -q -P 3 0 1M", uri)
    expect_equal([event for event in qmp.events if event["event"] == "BLOCK_WRITE_THRESHOLD"], [], "events below the threshold")
    tool("qemu-io", "-f", "raw", "-c", "write -q -P 3 1M 4M", uri)
    event = qmp.event("BLOCK_WRITE_THRESHOLD")
    expect_equal((event["node-name"], event["write-threshold"], event["amount-exceeded"] > 0), ("nf", 2 * MIB, True),
                 "the threshold's event")
    expect_equal(threshold(), 0, "the threshold after its event")
    rows = {row.get("node-name"): row for row in qmp.call("query-blockstats", **{"query-nodes": True})}
    reach = rows["nf"]["stats"]["wr_highest_offset"]
    if not 5 * MIB <= reach <= os.stat(written).st_size:
        raise Failure(f"the file's writes reach {reach}, it has {os.stat(written).st_size} bytes")
    expect_equal((rows["n"]["parent"]["node-name"], "backing" in rows["d"]), ("nf", False), "the rows of nodes")
    expect_equal(rows["nf"]["driver-specific"], {"driver": "file", "discard-nb-ok": 0, "discard-nb-failed": 0, "discard-bytes-ok": 0},
                 "discards before there are any")
    tool("qemu-io", "-f", "raw", "-c", "discard 2M 1M", "-c", "flush", uri)
    rows = {row.get("node-name"): row for row in qmp.call("query-blockstats", **{"query-nodes": True})}
    discards = rows["n"]["parent"]["driver-specific"]
    expect_equal((discards["discard-bytes-ok"], discards["discard-nb-ok"] > 0, discards["discard-nb-failed"], "driver-specific" in rows["n"]),
                 (MIB, True, 0, False), "discards of the file")
    qmp.call("nbd-server-stop")

    hmp = lambda line: qmp.call("human-monitor-command", **{"command-line": line})
    if not hmp("commit nonesuch").startswith("Device 'nonesuch' not found"):
        raise Failure("commit of no device wasn't refused")
    expect_equal(hmp("commit c"), "", "what commit prints")
    expect_equal(hmp("commit all"), "", "what commit all prints")
    qmp.call("quit")
    vm.expect_exit(0)
    for path in base, overlay, written:
        check(path)
    tool("qemu-io", "-c", "read -P 1 0 1M", "-c", "read -P 2 1M 1M", "-c", "read -P 1 2M 2M", base)
    expect_equal([part["depth"] for part in json.loads(tool("qemu-img", "map", "--output=json", overlay))
                  if part["depth"] == 0], [], "what the overlay still has")


@test(seconds=120)
def nodes_are_reopened(context):
    """With all of their options, as libvirt does it; and filters get another file, of the same group or another."""
    paths = {name: create(context, f"{name}.qcow2", 4 * MIB) for name in "ab"}
    vm, qmp = start(context, "-S", *context.kernel(""))
    for group in "gh":
        qmp.call("object-add", **{"qom-type": "throttle-group", "id": group})
    files = {name: {"driver": "file", "node-name": f"f{name}", "filename": path, "discard": "unmap"} for name, path in paths.items()}
    images = {name: {"driver": "qcow2", "node-name": name, "file": f"f{name}", "discard": "unmap", "backing": None} for name in "ab"}
    throttle = {"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "a"}
    for options in *files.values(), *images.values(), throttle:
        qmp.call("blockdev-add", **options)
    reopen = lambda *all_options: qmp.call("blockdev-reopen", options=list(all_options))
    socket = context.path("nbd")
    serve(qmp, socket, "t")
    io = lambda command: tool("qemu-io", "-f", "raw", "-c", command, f"nbd+unix:///disk?socket={socket}")
    io("write -q -P 1 0 4M")
    reopen({**throttle, "file": "b", "throttle-group": "h"})
    io("read -P 0 0 4M")
    io("write -q -P 2 0 4M")
    reopen({**files["a"], "read-only": True}, {**images["a"], "read-only": True, "cache": {"direct": False}})
    is_read_only = lambda: {node["node-name"]: node["ro"] for node in qmp.call("query-named-block-nodes")}
    expect_equal((is_read_only()["a"], is_read_only()["b"]), (True, False), "who is read-only")
    check(paths["a"])
    now = {**throttle, "file": "b", "throttle-group": "h"}
    for wrong in ({**files["b"], "read-only": True}, {**now, "file": "a"}, {**now, "file": "t"}, {**now, "throttle-group": "x"},
                  {**files["a"], "filename": paths["b"]}, {**images["a"], "driver": "raw"}, {**images["a"], "backing": "x"}):
        refused(qmp, "blockdev-reopen", options=[wrong])
    io("read -P 2 0 4M")
    reopen(files["a"], images["a"], throttle)
    io("read -P 1 0 4M")
    # A client keeps its export; one that has just gone doesn't.
    client = subprocess.Popen(["qemu-io", "-f", "raw", f"nbd+unix:///disk?socket={socket}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    client.stdin.write(b"read 0 512\n")
    client.stdin.flush()
    client.stdout.readline()
    refused(qmp, "block-export-del", id="e")
    client.communicate(b"quit\n")
    qmp.call("block-export-del", id="e")
    qmp.call("nbd-server-stop")
    qmp.call("quit")
    vm.expect_exit(0)
    for name, path in paths.items():
        check(path)
        tool("qemu-io", "-c", f"read -P {1 if name == 'a' else 2} 0 4M", path)


@test(seconds=120)
def jobs_of_a_transaction_end_together(context):
    """Of a disk on an I/O thread and one on none."""
    images = [create(context, name, 4 * MIB) for name in ("vd.qcow2", "n.qcow2")]
    for image in images:
        tool("qemu-io", "-c", "write -q -P 1 0 4M", image)
    vm, qmp = start(context, "-S", "-object", "iothread,id=io", *disk(images[0], "iothread=io"), *context.kernel(""))
    add_image(qmp, "n", images[1])
    for node in "d", "n":
        qmp.call("block-dirty-bitmap-add", node=node, name="b")
        add_image(qmp, f"t{node}", create(context, f"t{node}.qcow2", 4 * MIB))

    def backups(speed, mode="grouped", **more):
        actions = [{"type": "blockdev-backup", "data": {"job-id": f"j{node}", "device": node, "target": f"t{node}", "sync": "full",
                                                        "auto-dismiss": False, "speed": limit, **more}}
                   for node, limit in (("d", 0), ("n", speed))]
        qmp.call("transaction", actions=actions, properties={"completion-mode": mode})

    states = lambda: {row["id"]: row["status"] for row in qmp.call("query-jobs")}

    def until(wanted):
        while states() != wanted:
            qmp.event("JOB_STATUS_CHANGE")

    def dismiss():
        until({"jd": "concluded", "jn": "concluded"})
        errors = {row["id"]: row.get("error", "") for row in qmp.call("query-jobs")}
        for job in "jd", "jn":
            qmp.call("job-dismiss", id=job)
        return errors

    # The first waits for the second, and goes with it.
    backups(65536)
    until({"jd": "waiting", "jn": "running"})
    qmp.call("job-cancel", id="jn")
    dismiss()
    expect_equal({qmp.event("BLOCK_JOB_CANCELLED")["device"] for _ in range(2)}, {"jd", "jn"}, "what is cancelled")
    backups(65536)
    until({"jd": "waiting", "jn": "running"})
    qmp.call("block-job-set-speed", device="jn", speed=0)
    expect_equal({qmp.event("BLOCK_JOB_COMPLETED")["device"] for _ in range(2)}, {"jd", "jn"}, "what is completed")
    expect_equal(dismiss(), {"jd": "", "jn": ""}, "the errors of what succeeded")
    # One that is to be finalized by hand holds both.
    backups(0, **{"auto-finalize": False})
    until({"jd": "pending", "jn": "pending"})
    qmp.call("job-finalize", id="jd")
    expect_equal(dismiss(), {"jd": "", "jn": ""}, "the errors of what was finalized")
    # Each by itself.
    backups(65536, mode="individual")
    until({"jd": "concluded", "jn": "running"})
    qmp.call("job-cancel", id="jn")
    dismiss()
    # An error of one: its target fails.
    qmp.call("blockdev-del", **{"node-name": "tn"})
    qmp.call("blockdev-add", **{"driver": "qcow2", "node-name": "tn", "file": {
        "driver": "blkdebug", "inject-error": [{"event": "none", "iotype": "write", "errno": 5}],
        "image": {"driver": "file", "filename": context.path("tn.qcow2")}}})
    backups(0)
    errors = dismiss()
    expect_equal((errors["jd"], bool(errors["jn"])), ("", True), "the errors of what failed")
    events = [qmp.event("BLOCK_JOB_CANCELLED")["device"] for _ in range(2)]
    expect_equal(sorted(events), ["jd", "jn"], "what is cancelled at last")
    refused(qmp, "transaction", actions=[{"type": "block-dirty-bitmap-clear", "data": {"node": "n", "name": "b"}}],
            properties={"completion-mode": "grouped"})
    qmp.call("quit")
    vm.expect_exit(0)
    tool("qemu-img", "compare", images[0], context.path("td.qcow2"))


@test(seconds=120)
def exports_take_tls(context):
    image = create(context, "disk.qcow2", 4 * MIB)
    for name in "server", "client":
        os.mkdir(context.path(name))
        with open(os.path.join(context.path(name), "keys.psk"), "w", encoding="ascii") as file:
            file.write("qemu:" + "5a" * 32 + "\n")
    vm, qmp = start(context, "-S", "-object", f"tls-creds-psk,id=tls,endpoint=server,dir={context.path('server')}", "-blockdev",
                    f"driver=qcow2,node-name=n,file.driver=file,file.filename={image}", *context.kernel(""))
    socket = context.path("nbd")
    address = {"type": "unix", "data": {"path": socket}}
    qmp.call("object-add", **{"qom-type": "tls-creds-psk", "id": "mine", "endpoint": "client", "dir": context.path("client")})
    if "server endpoint" not in refused(qmp, "nbd-server-start", addr=address, **{"tls-creds": "mine"}):
        raise Failure("credentials of a client were refused for another reason")
    refused(qmp, "nbd-server-start", addr=address, **{"tls-creds": "nonesuch"})
    if not context.is_peer:
        refused(qmp, "nbd-server-start", addr=address, **{"tls-creds": "tls", "tls-authz": "nonesuch"})
    serve(qmp, socket, "n", **{"tls-creds": "tls"})
    run = subprocess.run(["qemu-io", "-f", "raw", "-c", "read 0 512", f"nbd+unix:///disk?socket={socket}"], capture_output=True,
                         text=True)
    if "TLS" not in run.stderr:
        raise Failure(f"a client without TLS was served: {run.stdout}{run.stderr}")
    tool("qemu-io", "--object", f"tls-creds-psk,id=t,endpoint=client,dir={context.path('client')}", "-c", "write -P 7 1M 64k",
         "--image-opts", f"driver=nbd,server.type=unix,server.path={socket},export=disk,tls-creds=t")
    qmp.call("nbd-server-stop")
    qmp.call("object-del", id="tls")
    qmp.call("quit")
    vm.expect_exit(0)
    tool("qemu-io", "-c", "read -P 7 1M 64k", image)


@test()
def disk_of_an_io_thread_goes_over_to_an_nbd_server(context):
    size = 32 * MIB
    top = chain(context, size)
    target = context.disk("target.img", size // MIB)
    socket = context.path("nbd")
    # It serves one client alone, and ends with it.
    server = subprocess.Popen(["qemu-nbd", "-k", socket, "-f", "raw", target])
    try:
        vm, qmp = start(context, "-object", "iothread,id=io", *disk(top, "iothread=io"),
                        *context.run(WAIT_FOR_DISK + Shell.COMMAND))
        shell = Shell(vm)
        shell.start("diskload /dev/vda 2000")
        qmp.call("blockdev-add", **{"driver": "raw", "node-name": "t", "file": {
            "driver": "nbd", "server": {"type": "unix", "path": socket}}})
        qmp.call("blockdev-mirror", **{"job-id": "mirror", "device": "d", "target": "t", "sync": "full"})
        job_event(qmp, "BLOCK_JOB_READY", "mirror")
        qmp.call("block-job-complete", device="mirror")
        job_event(qmp, "BLOCK_JOB_COMPLETED", "mirror")
        expect_equal(inserted(qmp)["node-name"], "t", "the node after the mirror's pivot")
        load_ends(vm)
        shell.finish()
        after = shell.digest("/dev/vda")
        qmp.call("quit")
        vm.expect_exit(0)
        server.wait(60)
    finally:
        server.kill()
        server.wait()
    expect_equal(contents(target, "raw"), after, "what the server has at the end")
