"""Export a Stable Diffusion pipeline for an iPhone: python examples/export_iphone.py [MODEL] [OUT] [PROFILE]

MODEL is a hub id, a folder, a .safetensors file, or nothing for the reference pipeline. Note: ONNX graphs run by
ONNX Runtime, with its Core ML provider where the phone's build has it; Core ML packages follow.
"""

import sys
from pathlib import Path

from latentrelay.device_profiles import load_profile
from latentrelay.export import export
from latentrelay.reference.pipeline import GUIDANCE, reference_path
from latentrelay.reference.students import student_path


def main(model: str | None = None, out: str = "bundles/iphone-15-pro", profile: str = "iphone-15-pro") -> None:
    device = load_profile(profile)
    own = {"student": student_path(device.student_class), "light_vae": reference_path() / "light_vae"}
    result = export(
        model or reference_path(),
        device,
        Path(out),
        num_steps=25,
        guidance=7.5 if model else GUIDANCE,
        progress=lambda words: print(words, file=sys.stderr),
        **({} if model else own),  # of your model: what `latentrelay compress` made
    )
    for component, decibel in result.parity_db.items():
        print(f"{component:14} {decibel:6.1f} dB against torch")
    print(f"{result.bundle}\n{result.digest}")


if __name__ == "__main__":
    if any(argument.startswith("-") for argument in sys.argv[1:]) or len(sys.argv) > 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
