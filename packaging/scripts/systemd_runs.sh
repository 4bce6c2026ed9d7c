# shellcheck shell=sh
# Not so in a container, or while an image is made.
systemd_runs() {
    [ -d /run/systemd/system ]
}
