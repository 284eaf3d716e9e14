"""Seeds one-line bugs into csrc/, one at a time, and runs the core tests: every bug must be caught.

    python -m tests.mutants [number ...]

A mutant that survives, or whose line is no longer in the source, fails the run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "mutants"
CORE = (
    "tests/engine/test_drop.py", "tests/cache/test_cache.py", "tests/engine/test_step.py",
    "tests/cache/test_refusals.py", "tests/cache/test_truncate.py", "tests/cache/test_state_machine.py",
)  # fmt: skip
WHAT_IF = ("tests/cache/test_what_if.py",)
NAMESPACES = ("tests/cache/test_namespaces.py", "tests/cache/test_state_machine.py")
HAZARD = ("tests/cache/test_hazard.py",)
JOURNAL = ("tests/cache/test_journal.py", "tests/cache/test_state_machine.py")
ATTENTION = (
    "tests/attention/test_cascade.py", "tests/attention/test_attention.py", "tests/attention/test_attention_formats.py",
    "tests/attention/test_quantized_rows.py", "tests/attention/test_attention_identity.py",
)  # fmt: skip
LATENT = ("tests/attention/test_latent.py",)


class Mutant(NamedTuple):
    bug: str
    file: str
    line: str
    instead: str
    tests: tuple[str, ...] = CORE


MUTANTS = [
    Mutant("a split forgets the lock", "cache/radix_tree.cpp", "u.locks = l.locks > 0;", "u.locks = 0;"),
    Mutant("a split forgets the pin", "cache/radix_tree.cpp", "u.pins = l.pins > 0;", "u.pins = 0;"),
    Mutant("a split makes its upper part hottest", "cache/radix_tree.cpp",
           "lru_.insert_hotter_than(n, upper);", "lru_.push_hottest(upper, u.list);"),
    Mutant("the path is touched root first", "cache/radix_tree.cpp",
           "if (listed(nodes_[n])) push_hottest(n, nodes_[n].list);",
           "if (listed(nodes_[n])) lru_.insert_colder_than(lru_.coldest(nodes_[n].list), n, nodes_[n].list);"),
    Mutant("what an ended session left waits like anything", "cache/radix_tree.cpp",
           "nodes_[n].list = ended;\n    if (on) push_hottest(n, ended);",
           "if (on) push_hottest(n, nodes_[n].list);"),
    Mutant("the last ended session goes first", "cache/radix_tree.cpp",
           "if (on) push_hottest(n, ended);",
           "if (on) lru_.insert_colder_than(lru_.coldest(ended), n, ended);"),
    Mutant("a session ends what others began with", "cache/radix_tree.cpp",
           "n.locks == 0 && !n.branched; };", "n.locks == 0; };"),
    Mutant("a session ends what a namespace above published", "cache/radix_tree.cpp",
           "return !n.root && n.space == space && n.locks", "return !n.root && n.locks"),
    Mutant("a session ends what others went on from", "cache/radix_tree.cpp",
           "if (nodes_[n].children != kNone && below == kNone) return;", ""),
    Mutant("a branch is not noticed", "cache/radix_tree.cpp", "  note_branch(parent);\n", ""),
    Mutant("a split forgets the branch", "cache/radix_tree.cpp", "u.branched = l.branched;", "u.branched = false;"),
    Mutant("a node that branched grows by pages that did not", "cache/radix_tree.cpp",
           " && !node.branched;", ";"),
    Mutant("a session ends a longer page", "cache/lease.cpp", "return seen.whole ? node : kNone;", "return node;"),
    Mutant("a parent joins no list when its last child goes", "cache/radix_tree.cpp",
           "      list_bared(parent);\n", "", HAZARD),
    Mutant("a leaf that gets a child stays on its list", "cache/radix_tree.cpp",
           "if (hazard_ && listed(nodes_[parent])) lru_.remove(parent);", "", HAZARD),
    Mutant("a page whose last child has left is hot again", "cache/hazard_order.cpp",
           "\n  lru_.insert_colder_than(cold, n, list);", "\n  lru_.push_hottest(n, list);", HAZARD),
    Mutant("uses before an eviction count for nothing", "cache/hazard_order.cpp",
           "use.uses += use.uses > 0 ? 1 : use.before + 1;", "use.uses += 1;", HAZARD),
    Mutant("pages of like tokens have one number", "cache/prefix_hash.hpp",
           "low = (low ^ (static_cast<std::uint64_t>(tokens[i]) + 1)) * 0xd6e8feb86659fd93u;",
           "low += static_cast<std::uint64_t>(tokens[i]) * 0xd6e8feb86659fd93u;", WHAT_IF),
    Mutant("the likeliest goes first", "cache/hazard_order.cpp", "(index > lowest ||", "(index < lowest ||", HAZARD),
    Mutant("what was evicted is not remembered", "cache/hazard_order.cpp",
           "const std::int32_t before = ghost ? ghost->uses : 0;", "const std::int32_t before = 0;", HAZARD),
    Mutant("a hole in the table of ghosts hides what comes after it", "cache/hazard.cpp",
           "    slots_[hole] = slots_[slot];\n    slots_[slot] = 0;\n    hole = slot;\n", "", HAZARD),
    Mutant("pages are rounded up once too often", "cache/lease.cpp",
           "(tokens + tree_.page_size() - 1) / tree_.page_size()", "(tokens + tree_.page_size()) / tree_.page_size()"),
    Mutant("the namespace is ignored", "cache/spaces.cpp",
           "const auto it = names_.find(name);", "const auto it = names_.begin(); (void)name;"),
    Mutant("one namespace sees its siblings' pages", "cache/child_index.cpp",
           "if (nodes_[child].space != space) return {kNone, 0};", "", NAMESPACES),
    Mutant("a namespace does not see those above", "cache/radix_tree.cpp",
           "for (int lower = levels; turns && --lower > level;) {",
           "for (int lower = level; turns && lower > level;) {", NAMESPACES),
    Mutant("a node grows by pages of a namespace below", "cache/radix_tree.cpp",
           " && node.space == space && node.locks", " && node.locks", NAMESPACES),
    Mutant("what a namespace above published is published again", "cache/radix_tree.cpp",
           "while (space != nodes_[n].space) {  // those above", "while (false) {  // those above", NAMESPACES),
    Mutant("clear leaves what is below", "cache/radix_tree.cpp",
           "if (spaces_.within(nodes_[n].space, space)) all.push_back(n);",
           "if (nodes_[n].space == space) all.push_back(n);", NAMESPACES),
    Mutant("what a namespace above had is restored as one's own", "cache/lease.cpp",
           "  publish_full(above);\n}", "  publish_full(space_);\n}", ("tests/tiers/test_hierarchical.py",)),
    Mutant("what is restored hangs above what it follows", "cache/lease.cpp",
           "!spaces.within(above, here)) above = here;", "false) above = here;",
           ("tests/tiers/test_hierarchical.py", "tests/tiers/test_tiered_state_machine.py")),
    Mutant("what is restored counts as the lease's", "cache/lease.cpp",
           "  tree_.spaces().moved(space_, space, count);\n", "", ("tests/tiers/test_hierarchical.py",)),
    Mutant("the journal does not know the namespace of what is restored", "cache/lease.cpp",
           "  tree_.make_space(name, above);  // which the journal may not know yet\n", "",
           ("tests/tiers/test_hierarchical.py",)),
    Mutant("a lease commits as anybody", "cache/lease.cpp",
           "above == kNone || !spaces.within(space_, above)", "above == kNone",
           ("tests/tiers/test_hierarchical.py",)),
    Mutant("a floor shields nothing", "cache/quotas.cpp",
           "spaces_[quota].used > spaces_[quota].floor;", "true;", NAMESPACES),
    Mutant("an eviction goes one page below a floor", "cache/quotas.cpp", "other.used - other.floor);",
           "other.used - other.floor + 1);", NAMESPACES),
    Mutant("shielded pages count as room", "cache/quotas.cpp",
           "if (s != top) room.evictable -= Spaces::shielded(spaces_[s]);", "(void)s;", NAMESPACES),
    Mutant("at its ceiling a namespace evicts others", "cache/radix_tree.cpp",
           "evict_more(own.used + need - own.ceiling, From::itself)",
           "evict_more(own.used + need - own.ceiling, From::everybody)", NAMESPACES),
    Mutant("a page to copy from is sought among as many as are needed", "cache/radix_tree.cpp",
           "take_this(watch, evicted.pages)", "take_this(watch, need)", NAMESPACES),
    Mutant("across lists the hottest goes first", "cache/quotas.cpp", "(*stamps_)[n] < (*stamps_)[best]",
           "(*stamps_)[n] > (*stamps_)[best]", NAMESPACES),
    Mutant("a list that moves loses its order", "cache/quotas.cpp",
           "while (hotter != kNone && (*stamps_)[hotter] < (*stamps_)[n])", "while (false)", NAMESPACES),
    Mutant("a freed page stays its namespace's", "cache/radix_tree.cpp",
           "  evictable_ -= pages;\n  spaces_.exposed(space, -pages);\n  spaces_.gave_back(space, pages);\n",
           "  evictable_ -= pages;\n  spaces_.exposed(space, -pages);\n", NAMESPACES),
    Mutant("what was evicted counts for the namespace that came after", "cache/radix_tree.cpp",
           "        count_evicted(counted, uncounted);\n        counted = node.space;",
           "        counted = node.space;\n        count_evicted(counted, uncounted);", NAMESPACES),
    Mutant("with quotas a choice does not see what was just evicted", "cache/radix_tree.cpp",
           "      if (quotas) count_evicted(counted, std::exchange(uncounted, 0));\n", "", NAMESPACES),
    Mutant("what was evicted last is not counted", "cache/radix_tree.cpp",
           "  count_evicted(counted, uncounted);\n  return out;", "  return out;"),
    Mutant("no token is left to compute", "cache/cache.cpp",
           "match(nearest, tokens, n - 1, lease->pages_.data())", "match(nearest, tokens, n, lease->pages_.data())"),
    Mutant("a page is evicted while it waits to be copied", "cache/radix_tree.cpp",
           "if (node.holds > 0) {", "if (false) {"),
    Mutant("a dropped hold leaves its page protected", "cache/radix_tree.cpp",
           "if (!node.detached) return expose(node);", "if (!node.detached) return;"),
    Mutant("duplicates are not freed", "cache/radix_tree.cpp", "    give_back(space, &run[k], 1);\n", ""),
    Mutant("a page is published before its copy is made", "cache/lease.cpp",
           "if (source_ != kNone) return false;  ", "  "),
    Mutant("a lease publishes into a cleared namespace", "cache/lease.cpp",
           "if (cleared()) return false;  ", "  "),
    Mutant("an open page is published while tokens in it are unwritten", "cache/lease.cpp",
           "(closing || num_written_ == num_tokens_)", "true"),
    Mutant("pages about to be locked count as evictable", "cache/cache.cpp",
           "need, tree_.evictable_on_path(m), m.tokens(page_size())", "need, 0, m.tokens(page_size())"),
    Mutant("a node grows under another lease", "cache/radix_tree.cpp", "node.locks == 1 &&", "node.locks >= 1 &&"),
    Mutant("a pin stays on the page that was replaced", "cache/lease.cpp",
           "if (pinned) cache_->move_pins(shorter, tail_);", ""),
    Mutant("the copied page forgets its tokens", "cache/lease.cpp",
           "std::memcpy(tree_.tokens(target), tree_.tokens(page), tokens * sizeof(Token));", "(void)0;"),
    Mutant("a fork does not lock", "cache/lease.cpp", "  tree_.lock(child.node_);\n", ""),
    Mutant("a dropped page is not freed", "cache/lease.cpp",
           "    tree_.give_back(space_, pages_.data() + own, first - own);\n", ""),
    Mutant("a dropped page that the tree has is freed", "cache/lease.cpp",
           "const std::int32_t own = std::max(num_shared_, first_page_);",
           "const std::int32_t own = first_page_;"),
    Mutant("what was dropped is published", "cache/lease.cpp",
           "return first_page_ <= num_shared_;  ", "return true;  "),
    Mutant("published tokens are taken back", "cache/lease.cpp", "tail_ != kNone ? num_tokens_ : shared", "shared"),
    Mutant("a copy goes into a page that was taken back", "cache/lease.cpp",
           "source_ != kNone ? shared + copy_.tokens : 0", "0"),
    Mutant("tokens found in the cache are taken back", "cache/lease.cpp", "{1}, num_cached_, published,",
           "{1}, published,"),
    Mutant("dropped tokens are taken back", "cache/lease.cpp", "copied, first_page_ * page_size}", "copied}"),
    Mutant("a page that was taken back is lost", "cache/lease.cpp",
           "  give_back_from(keep);\n", "  pages_.resize(keep);\n"),
    Mutant("tokens taken back count as written", "cache/lease.cpp",
           "  num_written_ = std::min(num_written_, num_tokens);\n", ""),
    Mutant("a lease is truncated inside an open step", "cache/lease.cpp",
           "std::int64_t Lease::truncate(std::int64_t num_tokens) {\n  change();",
           "std::int64_t Lease::truncate(std::int64_t num_tokens) {\n  use();"),
    Mutant("eviction takes one page too many", "cache/radix_tree.cpp",
           "out.pages < count && (victim", "out.pages <= count && (victim"),
    Mutant("a partly matched page is one token short", "cache/radix_tree.cpp",
           "m.partial = pages_.common_prefix(next, tokens + end, most);",
           "m.partial = std::max(0, pages_.common_prefix(next, tokens + end, most) - 1);"),
    Mutant("a step does not own its leases", "step/page_table.cpp", "lease.in_step_.store(true);", ""),
    Mutant("a lease grows inside an open step", "cache/lease.cpp",
           "void Lease::extend(const Token* tokens, std::int64_t n, bool prompt) {\n  change();",
           "void Lease::extend(const Token* tokens, std::int64_t n, bool prompt) {\n  use();"),
    Mutant("a further piece of a prompt is no input", "cache/lease.cpp", "  cache_->input_tokens_ += n;\n", "",
           NAMESPACES),
    Mutant("a lease is released inside an open step", "cache/lease.cpp",
           "void Lease::release(bool commit, bool cold) {\n  change();",
           "void Lease::release(bool commit, bool cold) {\n  use();"),
    Mutant("a step takes a lease of another engine", "step/page_table.cpp",
           "if (lease.cache_ != cache_)", "if (false)"),
    Mutant("a refused batch keeps its leases", "step/page_table.cpp",
           "  } catch (...) {\n    let_go();\n", "  } catch (...) {\n    open_.store(false);\n"),
    Mutant("a step left by an exception keeps its leases", "step/page_table.cpp",
           "note_written(table_.view().num_rows(static_cast<std::int32_t>(i)));\n  }\n  let_go();",
           "note_written(table_.view().num_rows(static_cast<std::int32_t>(i)));\n  }\n  if (written) let_go();"),
    Mutant("a lease of any engine is filled", "python/lease.cpp", "return &*l.owner == &cache;",
           "return (void)l, (void)cache, true;", ("tests/tiers/test_engine_tiers.py",)),
    Mutant("a step that nobody left keeps its leases", "python/step.cpp",
           "if (open_) page_table_->steps.let_go();", ""),
    Mutant("a step left in another thread advances", "step/page_table.cpp",
           "if (thread_ != std::this_thread::get_id())", "if (false)"),
    Mutant("a lease takes back a page that is to be copied", "cache/radix_tree.cpp",
           "n.locks == 1 && n.pins == 0 && n.holds == 0", "n.locks == 1 && n.pins == 0"),
    Mutant("a page that was taken back is found", "cache/radix_tree.cpp",
           "if (!n.detached) {\n    index_.remove(open);", "if (!n.detached) {"),
    Mutant("dropped pages count against the pool", "cache/lease.cpp",
           "std::max(0, first_page_ - num_shared_));", "0);"),
    Mutant("shared pages that were dropped do not count", "cache/lease.cpp",
           "std::max(0, first_page_ - num_shared_));", "first_page_);"),
    Mutant("what is missed is counted five pages too near", "cache/what_if.cpp",
           "const std::int64_t after = there_ - up_to(slots_[slot] - 1);",
           "const std::int64_t after = there_ - up_to(slots_[slot] - 1) - 5;", WHAT_IF),
    Mutant("larger pools hit only the first piece of a prompt", "cache/lease.cpp",
           "if (tree_.what_if() != nullptr) note_missed(tokens, n);",
           "if (tree_.what_if() != nullptr) tree_.what_if()->request(n, 0);", WHAT_IF),
    Mutant("larger pools hit pieces that follow an answer", "cache/lease.cpp",
           "if (num_prompt_ != num_tokens_) missed_.page = kNone;", "", WHAT_IF),
    Mutant("larger pools hit pieces that follow a cut", "cache/lease.cpp",
           "if (num_prompt_ > num_tokens) missed_.page = kNone;", "", WHAT_IF),
    Mutant("a page that ended a piece is not asked for", "cache/followers.cpp", "at.needed = needed;", "", WHAT_IF),
    Mutant("a page that ends a prompt is asked for", "cache/followers.cpp", "if (end < n) {", "if (true) {", WHAT_IF),
    Mutant("a page that is stored again is still away", "cache/what_if.cpp",
           "if (const std::uint64_t slot = slot_of(prefix); slots_[slot] != 0) remove(slot);\n}",
           "}", WHAT_IF),
    Mutant("what was cleared would have been hit", "cache/radix_tree.cpp",
           "if (what_if_) what_if_->forget();", "", WHAT_IF),
    Mutant("an eviction is another request's", "cache/cache.cpp",
           "tree_.serving(lease->number_);", "tree_.serving(lease->number_ - 1);", ("tests/cache/test_log.py",)),
    Mutant("an evicted page stays in the journal", "cache/followers.cpp",
           "    if (journal_) journal_->removed(page);", "", JOURNAL),
    Mutant("a held page that is evicted stays in the journal", "cache/radix_tree.cpp",
           "if (journal_) record_removed(node);", "", JOURNAL),
    Mutant("a node that grows is not in the journal", "cache/radix_tree.cpp",
           "if (journal_) record_run(n, node.space, node.last, run, count);", "", JOURNAL),
    Mutant("what is cleared is recorded parents first", "cache/radix_tree.cpp",
           "for (auto n = all.rbegin(); n != all.rend(); ++n) record_removed(nodes_[*n]);  // children first",
           "for (const NodeId n : all) record_removed(nodes_[n]);", JOURNAL),
    Mutant("an open page is in the journal", "cache/radix_tree.cpp",
           "if (journal_ && last_len == page_size()) record_run", "if (journal_) record_run", JOURNAL),
    Mutant("a query sees the key after its own", "attention/kernel/block.hpp",
           "min_int64(position(row) + 1 - tile, kTileKeys)",
           "min_int64(position(row) + 2 - tile, kTileKeys)", ATTENTION),
    Mutant("a window is one key too wide", "attention/kernel/block.hpp",
           "? 0 : own - window;", "? 0 : own - window - 1;", ATTENTION),
    Mutant("a chunk is one key too wide", "attention/kernel/block.hpp",
           "own / chunk * chunk);", "own / chunk * chunk - 1);", ATTENTION),
    Mutant("a sink above every logit is taken for less", "attention/kernel/state.hpp",
           "top = max > logit ? max : logit;", "top = max;", ATTENTION),
    Mutant("pages with new rows count as shared", "step/cascade.cpp",
           "(table_.kv_len(b) - rows) / table_.page_size)", "table_.kv_len(b) / table_.page_size)", ATTENTION),
    Mutant("a segment that is not used is served by nobody", "step/cascade.cpp",
           "segment.first_page = used ? above.page_end : above.first_page;", "segment.first_page = above.page_end;",
           ATTENTION),
    Mutant("a lease that folds keeps its version", "cache/lease.cpp",
           "  ++version_;\n  const std::int32_t k = tree_.replace_duplicates(",
           "  const std::int32_t k = tree_.replace_duplicates(",
           ("tests/attention/test_table.py",)),
    Mutant("a lease that drops keeps its version", "cache/lease.cpp", "  first_page_ = first;\n  ++version_;",
           "  first_page_ = first;", ("tests/attention/test_table.py",)),
    Mutant("the lists of an ended step are read", "step/step_table.cpp", "if (lists_.open_.load()) return;", "return;",
           ("tests/attention/test_table.py",)),
    Mutant("a cascade is kept when the rows change", "step/cascade.cpp",
           "table.qo_indptr == qo_indptr_ &&", "true &&", ("tests/attention/test_table.py",)),
    Mutant("of a pair of values the wrong one is used", "attention/kernel/block.hpp",
           "pack_value(second ? zeros() : row, second ? row : zeros(), s.single);",
           "pack_value(second ? row : zeros(), second ? zeros() : row, s.single);", ATTENTION),
    Mutant("keys are packed in another order than they are read in place", "attention/kernel/math.hpp",
           "return units + (d + 2 * half + j) * kLanes;",
           "return units + (d + 2 * half + (1 - j)) * kLanes;", ATTENTION),
    Mutant("8-bit values are rounded to odd on a tie", "attention/kernel/quantize.hpp",
           "bounded + 0x7ffffu +", "bounded + 0x80000u -", ATTENTION),
    Mutant("what 8 bits cannot hold becomes NaN", "attention/kernel/quantize.hpp",
           "size < 0x43e00000u ? size : 0x43e00000u;", "size < 0x43f80000u ? size : 0x43f80000u;", ATTENTION),
    Mutant("NaN in 8 bits becomes a number", "attention/kernel/quantize.hpp",
           "(size > 0x7f800000u ? 0x7fu : number)", "number", ATTENTION),
    Mutant("the scale of 8-bit values is forgotten", "attention/kernel/state.hpp",
           "mul(div(load(values + d), sum), scale)", "(scale, div(load(values + d), sum))", ATTENTION),
    Mutant("an output row keeps the order of the product's lanes", "attention/kernel/state.hpp",
           "Op::in_order(a, b);", "", ATTENTION),
    Mutant("the smallest 8-bit number in a pair is zero", "attention/isa/avx512.hpp", "epi16(0, 0x3b00,",
           "epi16(0, 0x0000,", ATTENTION),
    Mutant("the scale of a row of 8 bits is rounded down at times", "attention/kernel/quantize.hpp",
           "to_bf16_above(most / 127.0f)", "to_bf16(most / 127.0f)", ATTENTION),
    Mutant("a row that is not finite is stored as nothing", "attention/kernel/quantize.hpp",
           "row_scale = 0x7fc0,", "row_scale = 0,", ATTENTION),
    Mutant("a value that is not finite poisons nobody", "attention/kernel/integers.hpp",
           "scales.poisoned && scales.is_poisoned(lo[r], hi[r])",
           "false && scales.is_poisoned(lo[r], hi[r])", ATTENTION),
    Mutant("a value that is not finite poisons who does not see it", "attention/kernel/integers.hpp",
           "scales.poisoned && scales.is_poisoned(lo[r], hi[r])", "scales.poisoned", ATTENTION),
    Mutant("queries are not rotated as keys are", "attention/kernel/block.hpp",
           "if (batch.layer.k.rotated) rotate(vector, k_dim);", "", ATTENTION),
    Mutant("capped logits do not see the centre of the keys", "attention/kernel/block.hpp",
           "return sum / batch.layer.k.product_scale();", "return 0.0f;", ATTENTION),
    Mutant("both numbers of a byte are the first", "attention/isa/x86.hpp",
           "_mm_and_si128(_mm_srli_epi16(bytes, 4), mask)", "_mm_and_si128(bytes, mask)", ATTENTION),
    Mutant("a tile's weights are in units of the row's largest so far", "attention/kernel/integers.hpp",
           "const float top = most[r] > 1e-30f ? most[r] : 1e-30f;",
           "const float top = most[r] > units[r] ? most[r] : units[r] + 1e-30f;", ATTENTION),
    Mutant("every row's error is measured", "attention/dispatch.cpp", "% kSampled == 0;", "% 1 == 0;", ATTENTION),
    Mutant("a latent layer stores its values as well", "attention/plan.cpp",
           "kv.latent() ? RowCounts{} : put(kv.v, v, before.v.rows)", "put(kv.v, v, before.v.rows)", LATENT),
    Mutant("a latent value may be longer than its row", "attention/plan.cpp",
           "if (layer.v.dim > layer.k.dim) {", "if (false) {", LATENT),
    Mutant("a latent row may be rotated", "attention/plan.cpp",
           "if (layer.k.rotated || layer.k.centre != nullptr) {", "if (layer.k.centre != nullptr) {", LATENT),
    Mutant("a latent value is its whole row", "attention/layer.hpp", "layer.v.dim = v_dim;", "(void)v_dim;", LATENT),
]  # fmt: skip


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload, no-any-return]


def prepare() -> None:
    shutil.rmtree(BUILD, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", BUILD / "csrc")
    shutil.copytree(ROOT / "tests", BUILD / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "radixkv", BUILD / "radixkv", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", BUILD)
    nanobind = run([sys.executable, "-m", "nanobind", "--cmake_dir"], check=True).stdout.strip()
    run(
        ["cmake", "-S", "csrc", "-B", "out", f"-DPython_EXECUTABLE={sys.executable}", f"-Dnanobind_DIR={nanobind}",
         f"-DCMAKE_PREFIX_PATH={sysconfig.get_path('purelib')}", f"-DRADIXKV_OUTPUT={BUILD / 'radixkv'}"],
        cwd=BUILD, check=True,
    )  # fmt: skip


def build_and_test(tests: tuple[str, ...], timeout: float) -> str:
    """The word "passed", or how the build and tests ended."""
    if run(["cmake", "--build", "out"], cwd=BUILD).returncode:
        return "did not compile"
    environment = os.environ | {"PYTHONPATH": str(BUILD), "RADIXKV_EXAMPLES": "300", "RADIXKV_SHRINK": "0"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = run(command, cwd=BUILD, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        return "hung"
    if done.returncode == 0:
        return "passed"
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
    return failed[0].split(" - ")[0] if failed else f"crashed ({done.returncode})"


def main() -> int:
    chosen = [int(a) for a in sys.argv[1:]] or list(range(1, len(MUTANTS) + 1))
    prepare()
    start = time.monotonic()
    if (end := build_and_test(CORE + ATTENTION, 900)) != "passed":
        print(f"the code as it stands does not pass: {end}")
        return 1
    timeout = max(60.0, 3 * (time.monotonic() - start))  # a mutant that loops counts as killed
    survivors = 0
    for number in chosen:
        mutant = MUTANTS[number - 1]
        path = BUILD / "csrc" / mutant.file
        source = (ROOT / "csrc" / mutant.file).read_text()
        if source.count(mutant.line) != 1:
            end = f"its line is in {mutant.file} {source.count(mutant.line)} times"
        else:
            path.write_text(source.replace(mutant.line, mutant.instead))
            end = build_and_test(mutant.tests, timeout)
            path.write_text(source)
        killed = end not in ("passed", "did not compile") and not end.startswith("its line")
        survivors += not killed
        print(f"{number:2d} {'killed  ' if killed else 'SURVIVED'}  {mutant.bug}: {end}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
