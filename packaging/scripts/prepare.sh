# shellcheck shell=sh disable=SC2154
# Users and directories; then the modules are compiled, so that a start takes a third of the time and /usr stays as it was
# shipped. They run without that, too: a full /var is no reason to fail.
prepare() {
    systemd-sysusers "weighbridge-$part.conf"
    systemd-tmpfiles --create "weighbridge-$part.conf"
    rm -rf "/var/cache/weighbridge/$part"
    "$python" -IS -X pycache_prefix="/var/cache/weighbridge/$part" -m compileall -q \
        --invalidation-mode checked-hash "/usr/lib/weighbridge/$part" || true
    # What the daemon imports of Python itself is looked for there as well, and its user may not write there.
    case $part in agent) daemon=agent.daemon ;; *) daemon=$part.server ;; esac
    "$python" -IS -X pycache_prefix="/var/cache/weighbridge/$part" \
        -c "import sys; sys.path.insert(0, '/usr/lib/weighbridge/$part'); import $daemon" || true
}
