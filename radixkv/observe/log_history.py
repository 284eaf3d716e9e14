"""What was in a cache's tree after each request of its operation log, for `timeline_html`."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING

import numpy as np

from radixkv.errors import InvalidArgument
from radixkv.observe.timeline import History, Moment, Run

if TYPE_CHECKING:
    from radixkv.journal_story import Story

__all__ = ["history_of"]


def history_of(story: Story, first: int | None = None, last: int | None = None) -> History:
    """The history of a log between two of its steps: one for its beginning, for each request that ended, for its end.

    Each is the tree that `Story.state` gives, page for page. Requests that ended where records were lost have none.

    Raises InvalidArgument for steps that the log does not have.
    """
    first, last = story.begin if first is None else first, story.end if last is None else last
    if not story.begin <= first <= last <= story.end:
        raise InvalidArgument(f"steps {first} to {last}: the log has {story.begin} to {story.end}")
    ended = _ended(story, first, last)
    moments = [Moment(first, 0, 0.0), *(_moment(story, i) for i in ended)]
    if moments[-1].step < last:
        moments.append(Moment(last, 0, moments[-1].seconds))
    history = History(story.num_pages, moments=moments, uses=[-1] * len(moments))
    runs = _add_runs(history, story)
    for place, i in enumerate(ended, 1):
        release = story.releases[i]
        history.uses[place] = _last_run(history, runs, story.layers(release.tokens, release.namespace), place)
    return history


def _ended(story: Story, first: int, last: int) -> list[int]:
    """The places of the releases between two steps, in order."""
    ended = [i for i, release in enumerate(story.releases) if first <= release.at <= last]
    known = [i for i in ended if not any(begin < story.releases[i].at < end for begin, end in story.gaps)]
    return sorted(known, key=lambda i: story.releases[i].at)


def _moment(story: Story, i: int) -> Moment:
    since = min(story.release_times)
    return Moment(story.releases[i].at, story.releases[i].request, round(story.release_times[i] - since, 3))


def _add_runs(history: History, story: Story) -> dict[int, list[int]]:
    """Adds a run for each page that was there at some moment; prefix -> its runs."""
    runs: dict[int, list[int]] = {}
    steps = [moment.step for moment in history.moments]
    for life in story.lives():
        born = bisect_left(steps, life.born)
        died = len(steps) if life.died is None else bisect_left(steps, life.died)
        if born == died:  # it came and went between two moments
            continue
        page = story.prefixes[life.prefix]
        parent = runs[page.parent][-1] if page.parent >= 0 else -1
        runs.setdefault(life.prefix, []).append(len(history.runs))
        tokens = np.array(page.tokens, dtype=np.int32)
        history.runs.append(Run(parent, page.namespace, tokens, born=born, died=died if died < len(steps) else -1))
    return runs


def _last_run(history: History, runs: dict[int, list[int]], layers: list[list[int]], place: int) -> int:
    """The last run, of those by their place in a sequence, that was there at a moment; -1: none."""
    last = -1
    for layer in layers:
        there = [i for prefix in layer for i in runs.get(prefix, ()) if history.is_alive(i, place)]
        if not there:
            break
        last = there[0]
    return last
