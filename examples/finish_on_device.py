"""What an app does with a bundle: python examples/finish_on_device.py BUNDLE "a prompt" [CLOUD_URL]

Imports the runtime alone (no torch). The step loop is a generator, so a preview, a progress bar or a cancel button sits
between two steps; if the cloud is gone the device makes the whole picture and says so.
"""

import sys

from latentrelay.runtime import Bundle, Session, StepEvent, generate


def main(bundle: str, prompt: str, cloud: str | None = None) -> None:
    def on_step(event: StepEvent) -> None:
        print(f"step {event.step + 1}/{event.num_steps}: {event.ms:.0f} ms", file=sys.stderr)

    with Session(Bundle.open(bundle)) as session:
        result = generate(session, prompt, seed=7, cloud=cloud, on_step=on_step)
    result.save_png("out.png")
    print(f"out.png: {result.path_taken}, {result.steps['cloud']} steps there, {result.steps['device']} here")
    if result.fallback_reason:
        print(f"the cloud was out of reach: {result.fallback_reason}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(*sys.argv[1:])
