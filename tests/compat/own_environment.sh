#!/usr/bin/env bash
# stabilitylab in an environment that was there before it: torch and the transformers that EasyEdit pins. The wheel is
# installed, a loop is watched, and the run is looked at by each command and in TensorBoard's tab. Run by `make compat-own`.
#
#     own_environment.sh ENVIRONMENT [TRANSFORMERS]     a folder for a new environment; a release, by default 4.46.3
set -euo pipefail
environment=$1 release=${2:-4.46.3}
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=$environment/bin/python
work=$(mktemp -d)
server=
trap '[ -z "$server" ] || kill "$server" 2>/dev/null; rm -rf "$work"' EXIT

"${PYTHON:-python3}" -m venv --clear "$environment"
pip() { "$python" -m pip --disable-pip-version-check --quiet --quiet "$@"; }
torch=$(sed -n 's/^torch==//p' "$root/constraints.txt")
pip install "torch==$torch" "transformers==$release"
"$python" -m pip --disable-pip-version-check freeze | sort >"$work/before"

pip install build
"$python" -m build --wheel --outdir "$work" "$root" >"$work/build.log" 2>&1
pip uninstall --yes build pyproject_hooks
pip install "$work"/*.whl
"$python" -m pip --disable-pip-version-check freeze | sort >"$work/after"

echo "== what was there and is another now (nothing is right):"
comm -23 "$work/before" "$work/after"
echo "== pip check:"
"$python" -m pip --disable-pip-version-check check
cd "$work"
echo "== a loop:"
"$python" "$here/loop.py" runs/loop
echo "== check:"
"$environment/bin/stabilitylab" check runs/loop
echo "== report:"
"$environment/bin/stabilitylab" report runs/loop
echo "== TensorBoard's tab:"
"$environment/bin/tensorboard" --logdir runs --port 0 >server.log 2>&1 &
server=$!
for _ in $(seq 120); do
  address=$(grep -o 'http://[^ ]*' server.log | head -1 || true)
  [ -n "$address" ] && break
  sleep 0.5
done
"$python" - "$address" <<'PYTHON'
import json, sys, time, urllib.request

def get(path):
    with urllib.request.urlopen(sys.argv[1].rstrip("/") + path) as answer:
        return json.load(answer)

assert "stability" in get("/data/plugins_listing")
for _ in range(60):
    runs = get("/data/plugin/stability/runs")["runs"]
    if runs and runs[0]["state"] == "read":
        break
    time.sleep(0.5)
print(runs[0]["name"], runs[0]["state"], runs[0]["verdict"])
PYTHON
