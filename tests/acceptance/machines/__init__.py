"""Throw-away virtual machines: Debian 12's kernel, systemd as pid 1, pure cgroup v2, podman, no network.

    mirror.sh, qemu.sh, image.sh    packages of this machine's own mirror -> QEMU, a root disk, a kernel
    cache.py                        what was built once, outside the checkout; locked, bounded, swept
    guest/                          what runs inside: the initrd's init, the server of commands, the scene
    qemu.py                         one QEMU process and its control socket
    snapshot.py                     disk + guest -> booted once, memory and devices saved
    machine.py                      a restored machine: run, put, get

Nothing of a machine outlives it: it writes into an overlay of its own, and QEMU dies with its parent.
"""
