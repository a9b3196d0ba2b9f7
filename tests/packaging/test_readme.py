"""README and docs/: every public name is listed, links and anchors lead somewhere, code does what the page says."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gssf_kernels as gk

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    *sorted(ROOT.glob("examples/*/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_lists_every_public_name():
    section = README.read_text().split("## Functions\n")[1].split("\n## ")[0]
    listed = {name for line in section.splitlines() if line.startswith("|") for name in re.findall(r"`(\w+)`", line)}
    assert sorted(set(gk.__all__) - listed) == []


def test_readme_is_short():
    lines = README.read_text().splitlines()
    assert len(lines) <= 110
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_readme_has_the_marks_that_the_benchmark_writes_between():
    assert README.read_text().count("<!-- bench headline -->\n") == 1
    assert (ROOT / "docs/benchmarks.md").read_text().count("<!-- bench -->\n") == 1


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    text = FENCE.sub("", page.read_text())
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    broken = []
    for target in targets:
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert broken == []


def test_the_changed_line_gives_the_same_loss_and_gradients():
    (diff,) = blocks(README, "diff")

    def loss_and_gradients(other: str):
        code = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith(other))
        torch.manual_seed(0)
        images, captions = (torch.randn(48, 32, dtype=torch.float64, requires_grad=True) for _ in "xy")
        names = {"F": F, "images": images, "captions": captions, "image_tower": lambda t: t, "text_tower": lambda t: t}
        exec(code, names)
        return names["loss"].detach(), images.grad, captions.grad

    before, after = loss_and_gradients("+"), loss_and_gradients("-")
    assert before[0] > 1
    for ours, plain in zip(after, before, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_of_the_page_runs(page):
    torch.manual_seed(0)
    names: dict = {}
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)


def test_the_metric_of_the_readme_is_trained_and_retrieves():
    torch.manual_seed(0)
    names: dict = {}
    (code,) = blocks(README, "python")
    exec(code, names)
    metric, images, captions = names["metric"], names["images"], names["captions"]
    for trained in (images, captions, metric.diag, metric.blocks):
        assert trained.grad.abs().sum() > 0
    scores = gk.similarity(images, captions, metric.diag, metric.blocks, normalize=True)
    positive = names["picture"][:, None] == names["described"]
    best = torch.where(positive, scores, -torch.inf).amax(1, keepdim=True)
    rank = 1 + (~positive & (scores >= best)).sum(1)
    for k in (1, 5, 10):
        assert names["result"][f"x_to_y.recall@{k}"] == pytest.approx(float((rank <= k).float().mean()))
