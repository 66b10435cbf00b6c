# SPDX-License-Identifier: Apache-2.0
# Functions of the set-up scripts, which source this file. They set $name (for messages) and $venv first.

say() { printf '[%s] %s\n' "$name" "$*"; }
fail() {
    printf '[%s] error: %s\n' "$name" "$*" >&2
    exit 1
}

torch_version=2.13.0
uv_version=0.13.9

# Two targets of make may run this at the same time.
lock_environment() {
    mkdir -p "$venv"
    if command -v flock >/dev/null; then
        exec 9>"$venv/.setup.lock"
        flock 9
    fi
}

# The interpreter to make an environment with, in $python.
choose_python() {
    python=${PYTHON:-}
    if [ -z "$python" ]; then
        if python3.11 -c '' 2>/dev/null; then python=python3.11; else python=python3; fi
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] < (3, 10))' 2>/dev/null ||
        fail "$python is not Python 3.10 or newer (3.11 is what was checked); set PYTHON=/path/to/python3.11"
}

# uv does not read pip's settings: pass them on.
configure_uv() {
    PATH="$PWD/$venv/bin:$PATH"
    export PATH
    if [ -z "${UV_DEFAULT_INDEX:-}" ]; then
        index=${PIP_INDEX_URL:-$("${python:-$venv/bin/python}" -m pip config get global.index-url 2>/dev/null || true)}
        if [ -n "$index" ]; then export UV_DEFAULT_INDEX="$index"; fi
    fi
    if [ -n "${PIP_CERT:-}" ] && [ -z "${SSL_CERT_FILE:-}" ]; then export SSL_CERT_FILE="$PIP_CERT"; fi
    if [ -n "${PIP_FIND_LINKS:-}" ] && [ -z "${UV_FIND_LINKS:-}" ]; then export UV_FIND_LINKS="$PIP_FIND_LINKS"; fi
    # Compile byte code once, here: if PYTHONDONTWRITEBYTECODE is set, every process would compile it again.
    export UV_PYTHON="$PWD/$venv/bin/python" UV_LINK_MODE=copy UV_NO_PROGRESS=1 UV_COMPILE_BYTECODE="${UV_COMPILE_BYTECODE:-1}"
}

# A fresh $venv with uv and a torch for CPUs in it.
make_environment() {
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$uv_version"
    say "installing torch $torch_version for CPU"
    if ! { [ -n "${UV_FIND_LINKS:-}" ] && uv pip install --quiet "torch==$torch_version+cpu"; }; then
        uv pip install --quiet --torch-backend=cpu "torch==$torch_version"
    fi
}
