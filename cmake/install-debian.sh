#!/bin/sh
# Installs the Debian packages that Lithe's demo and tests need, and those named as arguments, as root or with sudo.
# Once all are there it touches nothing, so it works offline.
set -eu
missing=
for package in $(cat "$(dirname "$0")/debian-packages.txt") "$@"; do
  case $(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null) in
    installed) ;;
    *) missing="$missing $package" ;;
  esac
done
[ -n "$missing" ] || exit 0

echo "Installing:$missing"
root=
if [ "$(id -u)" != 0 ]; then
  command -v sudo >/dev/null || { echo "Neither root nor sudo: please have these packages installed:$missing" >&2; exit 1; }
  root=sudo
fi
$root apt-get update -q
# shellcheck disable=SC2086  # a list of words
$root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
