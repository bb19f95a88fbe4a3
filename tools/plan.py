"""`latentrelay plan`: which split, precision and mask meet a latency or cost goal with the least loss of quality.

In: a device profile, bundles measured here or released students, a link, a cloud and a price. Out: rows, their Pareto
frontier, and the one chosen with its reason. It builds nothing and invents no quality: what was not measured says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentrelay.device_profiles import load_profile
from latentrelay.runtime.errors import REFUSED, RequestError
from latentrelay.tools.console import counting, emit, err, extra, printable
from latentrelay.tools.networks import Network, parse_network
from latentrelay.tools.plan_choice import Choice, Goals, choose
from latentrelay.tools.plan_cloud import CloudSpeed, Price, asked, of_sweeps, parse_price
from latentrelay.tools.plan_evidence import Evidence
from latentrelay.tools.plan_options import of_bundles, of_released
from latentrelay.tools.plan_rows import Row, rows
from latentrelay.tools.plan_times import is_this_machine


def run(
    device: str,
    networks: Sequence[str],
    *,
    bundles: Sequence[Path] = (),
    model: str = "reference",
    price: str | None = None,
    max_latency_s: float | None = None,
    max_cost: float | None = None,
    cloud: str | None = None,
    token: str | None = None,
    cloud_step_ms: float | None = None,
    sweep: Path | None = None,
    here: bool = False,
    unmeasured: bool = False,
    device_watts: float | None = None,
    profiles: Path | None = None,
    output: Path | None = None,
    as_json: bool = False,
) -> int:
    """Plan, print, and with `output` plot; the exit status: 0, or 3 where nothing meets the goals.

    `here`: the device is this machine, so bundles are timed now (a profile that `devices measure` wrote here says so
    itself). Raises RequestError, ProfileError, BundleError, CloudError and what plan_times and plan_cloud raise.
    """
    if output is not None and not output.absolute().parent.is_dir():
        raise RequestError("the plot's folder does not exist", got=str(output), do="Make it first.")
    links = [parse_network(words) for words in dict.fromkeys(networks)]
    goals, money = Goals(max_latency_s, max_cost), parse_price(price)
    _check(links, goals, money, cloud, cloud_step_ms, here, bundles)
    profile, evidence = load_profile(device, profiles), Evidence.load(sweep)
    if bundles:
        timed = here or is_this_machine(profile)
        with counting("reading bundles", None) as advance:
            options = of_bundles(bundles, profile, evidence, here=timed, progress=lambda words: advance(words, 1))
    else:
        options = of_released(profile, evidence, model)
    speed = _cloud(cloud, token, cloud_step_ms, evidence)
    for option in options:
        speed.check(option.model_digest)
    found = rows(options, links, speed, evidence, money, device_watts)
    choices = {
        link.name: choose([row for row in found if row.network == link], goals, unmeasured=unmeasured) for link in links
    }
    document = _document(profile.name, links, speed, money, goals, found, choices)
    if output is not None:
        with extra("export", "a plot"):
            from latentrelay.tools.plan_plot import plot
        output.write_bytes(plot(document))
        err.print(f"written: {printable(output)}")
    from latentrelay.tools.plan_show import show

    emit(document, as_json, lambda console: show(console, document))
    return 0 if document["ok"] else REFUSED


def _check(
    links: Sequence[Network],
    goals: Goals,
    price: Price | None,
    cloud: str | None,
    cloud_step_ms: float | None,
    here: bool,
    bundles: Sequence[Path],
) -> None:
    if not links:
        raise RequestError("no network is named", expected="--network NAME or RTT_MS:MBIT")
    for name, value in (("--max-latency", goals.max_latency_s), ("--max-cost", goals.max_cost)):
        if value is not None and not 0 <= value < math.inf:
            raise RequestError(f"{name} is out of range", got=value, expected="a finite number, 0 or more")
    if cloud_step_ms is not None and not 0 < cloud_step_ms < math.inf:
        raise RequestError("--cloud-step-ms is out of range", got=cloud_step_ms, expected="more than 0")
    if goals.max_cost is not None and price is None:
        raise RequestError("--max-cost needs a price", do="Give --price, for an hour of the cloud or for a step.")
    if cloud is not None and cloud_step_ms is not None:
        raise RequestError("both a cloud and its step's time were given", do="Give one of them.")
    if here and not bundles:
        raise RequestError("--here times bundles, and none was given", do="Give --bundle DIR.")


def _cloud(url: str | None, token: str | None, step_ms: float | None, evidence: Evidence) -> CloudSpeed:
    if step_ms is not None:
        return CloudSpeed(step_ms, "given", "the command line")
    known = of_sweeps(evidence.sweeps)
    return known if url is None else asked(url, token, known)


def _document(
    device: str,
    links: Sequence[Network],
    cloud: CloudSpeed,
    price: Price | None,
    goals: Goals,
    found: Sequence[Row],
    choices: dict[str, Choice],
) -> dict[str, Any]:
    first = choices[links[0].name]
    front = {id(row) for choice in choices.values() for row in choice.frontier}
    chosen = first.chosen
    return {
        "ok": all(choice.chosen is not None for choice in choices.values()),
        "device": device,
        "networks": [_link(link) for link in links],
        "cloud": {
            "step_ms": round(cloud.step_ms, 3),
            "queue_ms_per_step": round(cloud.queue_ms_per_step, 3),
            "label": cloud.label,
            "source": cloud.source,
            "url": cloud.url,
        },
        "price": None if price is None else {"amount": price.amount, "per": price.per},
        "goals": {"max_latency_s": goals.max_latency_s, "max_cost": goals.max_cost},
        "rows": [
            {**row.to_dict(), "on_frontier": id(row) in front, "meets_goals": goals.excess(row) <= 1} for row in found
        ],
        "frontier": [row.to_dict() for choice in choices.values() for row in choice.frontier],
        "chosen": None if chosen is None else {**chosen.to_dict(), "commands": commands(device, chosen, cloud.url)},
        "reason": first.reason,
        "nearest_miss": first.nearest.to_dict() if first.nearest else None,
        "alike": [row.to_dict() for row in first.alike],
        "by_network": {
            name: {
                "chosen": choice.chosen.to_dict() if choice.chosen else None,
                "reason": choice.reason,
                "nearest_miss": choice.nearest.to_dict() if choice.nearest else None,
            }
            for name, choice in choices.items()
        },
    }


def commands(device: str, row: Row, url: str | None) -> list[str]:
    """What to run to get this row: the build where there is no bundle yet, then a picture."""
    option, mask, folder = row.option, row.mask, str(row.option.bundle or f"bundle-{row.option.student}")
    said = []
    if option.bundle is None:
        build = f"latentrelay build --device {device} --student {option.student} --precision {option.precision}"
        if mask.predicted and mask.settings in option.speedups:
            build += f" --speedup {option.speedups[mask.settings]:.3g} --predict-splits {mask.split}"
        said.append(f"{build} -o {folder}")
    generate = f"latentrelay generate --bundle {folder} --split {mask.split} -p PROMPT"
    if mask.split:
        generate += f" --cloud {url or 'URL'}"
    if option.masks and not mask.predicted:
        generate += " --no-predict"
    return [*said, generate]


def _link(link: Network) -> dict[str, Any]:
    return {
        "name": link.name,
        "rtt_ms": link.rtt_ms,
        "down_mbit": link.down_mbit,
        "up_mbit": link.up_mbit,
        "label": link.label,
        "source": link.source,
    }
