"""Loading an encoder imports neither torch's compiler nor LanceDB: either costs most of a second."""

import subprocess
import sys

import tiny_towers as tiny

from clipworks.encoders.loading import save


def test_loading_stays_light(tmp_path):
    save(tiny.encoder().float(), tmp_path / "tiny.safetensors")
    code = (
        "import sys; from clipworks.encoders.loading import load; load(sys.argv[1]); "
        "print([m for m in ('torch._dynamo', 'lancedb', 'sklearn', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tiny.safetensors")], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "[]", done.stderr
