"""One QEMU process: how it is called, its control socket (QMP) and the port to the guest."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.acceptance.machines.cache import Cache, Unavailable, build_step, key_of

HERE = Path(__file__).parent
OLDEST_MAJOR = 8
"""QEMU 7.2's software emulation corrupts flags under newer guest kernels."""
MEMORY_MIB = 2_048
FREIGHT_BYTES = 1 << 30
CPUS = 2
AT_A_TIME = 2
"""Machines that `./dev test` runs beside each other."""
EMULATED_CPU = "max,la57=off,erms=off,fsrm=off"
"""With `erms` the kernel copies and clears byte by byte (`rep movsb`), which is quick in silicon and a loop in software:
without it a package is unpacked in two thirds of the time."""
KERNEL_COMMAND_LINE = (
    "console=ttyS0 root=/dev/vda rw quiet loglevel=4 panic=-1 psi=1 mitigations=off nokaslr norandmaps "
    "random.trust_cpu=on tsc=reliable no_timer_check cryptomgr.notests systemd.show_status=error"
)


class MachineError(Exception):
    """The machine itself failed; the message has the end of its console."""


@dataclass(frozen=True, slots=True)
class Emulator:
    """The QEMU at hand and what it emulates with. A snapshot fits only the same one."""

    qemu: str
    qemu_img: str
    version: str
    accelerator: str
    cpu: str

    @property
    def shape(self) -> str:
        host_cpu = _cpu_flags() if self.accelerator == "kvm" else ""
        hardware = f"{self.version} {self.accelerator} {self.cpu} {CPUS} {MEMORY_MIB} {FREIGHT_BYTES}"
        return f"{hardware} {KERNEL_COMMAND_LINE} {host_cpu}"

    def overlay(self, base: Path, base_format: str, overlay: Path) -> None:
        """A disk that reads through to `base` and keeps what is written for itself."""
        command = [
            self.qemu_img,
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            str(base),
            "-F",
            base_format,
            str(overlay),
        ]
        subprocess.run(command, check=True, timeout=60)


@contextmanager
def emulator(cache: Cache) -> Iterator[Emulator]:
    """The installed QEMU if it is new enough, else Debian's, unpacked into the cache."""
    qemu, qemu_img = shutil.which("qemu-system-x86_64"), shutil.which("qemu-img")
    if qemu and qemu_img and _major(_version(qemu)) >= OLDEST_MAJOR:
        yield _emulator(qemu, qemu_img)
        return
    key = key_of(HERE / "qemu.sh", HERE / "mirror.sh")
    with cache.entry("qemu", key, lambda to: build_step([HERE / "qemu.sh", to])) as directory:
        yield _emulator(str(directory / "qemu-system-x86_64"), str(directory / "qemu-img"))


def _emulator(qemu: str, qemu_img: str) -> Emulator:
    # /dev/kvm alone is not enough: under nested paravirtualisation a stock kernel crawls.
    flags = _cpu_flags().split()
    hardware = os.access("/dev/kvm", os.R_OK | os.W_OK) and ("vmx" in flags or "svm" in flags)
    return Emulator(qemu, qemu_img, _version(qemu), *(("kvm", "host") if hardware else ("tcg", EMULATED_CPU)))


def _threads() -> str:
    """One host thread for each of a machine's CPUs, where the host has as many: an emulated CPU that waits for another one
    spins, and takes the time that the other one needs. On two CPUs two machines do with one thread each in 115 CPU-seconds
    what takes them 150 with two."""
    return "multi" if len(os.sched_getaffinity(0)) >= AT_A_TIME * CPUS else "single"


def _version(qemu: str) -> str:
    said = subprocess.run([qemu, "--version"], capture_output=True, text=True, timeout=20)
    if said.returncode != 0:
        raise Unavailable(f"{qemu} does not run here; remove it to have it made anew: {said.stderr.strip()}")
    return said.stdout.split("\n")[0]


def _major(version: str) -> int:
    found = re.search(r"version (\d+)", version)
    return int(found[1]) if found else 0


def _cpu_flags() -> str:
    lines = Path("/proc/cpuinfo").read_text().split("\n")
    return next((line for line in lines if line.startswith("flags")), "")


class Qemu:
    """A running machine. `port` is the connected stream to the guest; `freight` a file that it has as a disk, empty at first:
    what takes the port minutes takes a disk seconds."""

    def __init__(
        self,
        emulator: Emulator,
        directory: Path,
        disk: Path,
        kernel: Path,
        initrd: Path,
        incoming: Path | None,
    ) -> None:
        self._directory = directory
        self.freight = directory / "freight"
        self.freight.touch()
        os.truncate(self.freight, FREIGHT_BYTES)
        self.port, port = socket.socketpair()
        self._control, control = socket.socketpair()
        acceleration = "kvm" if emulator.accelerator == "kvm" else f"tcg,thread={_threads()},tb-size=256"
        command = [
            # If this process is killed, so is the machine.
            *("setpriv", "--pdeathsig", "KILL", "--", emulator.qemu),
            *("-machine", "q35,usb=off", "-accel", acceleration, "-cpu", emulator.cpu),
            *("-m", str(MEMORY_MIB), "-smp", str(CPUS), "-nodefaults", "-no-user-config", "-display", "none"),
            *("-no-reboot", "-rtc", "base=utc", "-serial", f"file:{directory}/console", "-nic", "none"),
            *("-drive", f"file={disk},if=none,id=disk,format=qcow2,cache=unsafe"),
            *("-drive", f"file={self.freight},if=none,id=freight,format=raw,cache=unsafe"),
            *(
                "-device",
                "virtio-blk-pci,drive=disk",
                "-device",
                "virtio-blk-pci,drive=freight,serial=freight",
            ),
            *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci"),
            *("-chardev", f"socket,id=port,fd={port.fileno()}"),
            *("-device", "virtserialport,chardev=port,name=weighbridge"),
            *("-chardev", f"socket,id=control,fd={control.fileno()}", "-mon", "chardev=control,mode=control"),
            *("-kernel", str(kernel), "-initrd", str(initrd), "-append", KERNEL_COMMAND_LINE),
            *(("-incoming", f"exec:zstd -qdc '{incoming}'") if incoming else ()),
        ]
        with (directory / "qemu").open("wb") as journal, port, control:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=journal,
                stderr=journal,
                pass_fds=(port.fileno(), control.fileno()),
                start_new_session=True,
            )
        self._control.settimeout(60)
        self._lines = self._control.makefile("rw")
        try:
            self._lines.readline()
            self.ask("qmp_capabilities")
        except BaseException:
            self.kill()
            raise

    def ask(self, command: str, **arguments: Any) -> Any:
        """One QMP command and its answer. MachineError if QEMU refuses or has gone."""
        try:
            self._lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            self._lines.flush()
        except OSError as error:
            raise MachineError(f"QEMU has gone: {self.last_words()}") from error
        for line in self._lines:
            answer = json.loads(line)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise MachineError(f"{command}: {answer['error']['desc']}")
        raise MachineError(f"QEMU has gone: {self.last_words()}")

    def wait_status(self, query: str, wanted: str, seconds: float = 120) -> None:
        """Until a query's status is `wanted`."""
        deadline = time.monotonic() + seconds
        while (status := self.ask(query).get("status")) != wanted:
            if status == "failed" or time.monotonic() > deadline:
                raise MachineError(f"{query}: {status}, not {wanted}: {self.last_words()}")
            time.sleep(0.05)

    def last_words(self) -> str:
        """The end of what QEMU and the guest's console said."""
        texts = []
        for name in ("qemu", "console"):
            file = self._directory / name
            if file.exists():
                texts.append(file.read_text(errors="replace")[-2_000:].strip())
        return "\n".join(texts)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.port.close()
        self._control.close()
