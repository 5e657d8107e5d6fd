"""Find the sites of a block from its activations: which module's input or output is attn_out, mlp_in and so on.

A block is run on a few tokens, then run again with one thing changed:

- Its two *parts* are the modules whose outputs a and m satisfy resid_pre + a + m = resid_post, within rounding. If
  several modules have equal outputs, the outermost one is chosen.
- The part whose output at a token changes when an earlier token changes is the attention, or its replacement, such as a
  Mamba or DeltaNet mixer; the other part is the MLP.
- If changing the attention's output changes the MLP's output, the two are sequential, and some module reads resid_mid =
  resid_pre + a; otherwise they are parallel.
- The projection of a part is the linear map whose output, with or without a norm after it, is the part's output.
  The input of the projection is attn_z or mlp_hidden.

A site that these tests do not confirm is refused, with a description of what was observed. Every tensor here has
the shape (N S, width).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .module_io import output_tensor, with_input
from .recorder import BlockSites, Call, Recorder, Site, shapes_of

INNER_SITES = ("resid_mid", "attn_out", "attn_z", "mlp_in", "mlp_hidden", "mlp_out")
NOISE = 0.5  # the size of a change, relative to the activations


@torch.no_grad()
def find_sites(block: nn.Module, call: Call, shape: tuple[int, int]) -> BlockSites:
    """Find the sites of a block from one call of the block on tokens of `shape` (N, S)."""
    probe = BlockProbe(block, call, shape)
    found = probe.found
    if probe.resid_pre is None or probe.resid_post is None:
        seen = [None if z is None else tuple(z.shape) for z in (call.x, call.y)]
        why = f"the block reads activations of shape {seen[0]} and returns shape {seen[1]} for tokens of shape {shape}"
        found.refused = dict.fromkeys(("resid_pre", *INNER_SITES, "resid_post"), why)
        return found
    if probe.reads_later_tokens():
        why = "a token's activations depend on later tokens, so it is not a causal language model"
        found.refused = dict.fromkeys(("resid_pre", *INNER_SITES, "resid_post"), why)
        return found
    width = probe.resid_post.shape[1]
    found.sites["resid_pre"] = Site("", True, probe.resid_pre.shape[1])
    found.sites["resid_post"] = Site("", False, width)
    if unsound := probe.unsound():
        found.refused = dict.fromkeys(INNER_SITES, unsound)
    else:
        probe.find_parts()
        probe.find_projections()
    return found


class BlockProbe:
    """The activations of a block in one run (`calls`), and methods that run it again with one thing changed."""

    def __init__(self, block: nn.Module, call: Call, shape: tuple[int, int]) -> None:
        self.block, self.call, self.shape = block, call, shape
        self.found = BlockSites(shape=shape)
        self.generator = torch.Generator().manual_seed(0)
        self.resid_pre, self.resid_post = self.rows(call.x), self.rows(call.y)
        self.later_rows = torch.arange(shape[0] * shape[1]).remainder(shape[1]) > 0
        calls = self.run()
        self.found.shapes = {path: shapes_of(of_path) for path, of_path in calls.items()}
        self.calls = {path: of_path[0] for path, of_path in calls.items() if len(of_path) == 1}
        self.order = {path: number for number, path in enumerate(self.calls)}
        self.x = {path: x for path, call in self.calls.items() if (x := self.rows(call.x)) is not None}
        self.y = {path: y for path, call in self.calls.items() if (y := self.rows(call.y)) is not None}
        self.parts: dict[str, str] = {}  # "attention" and "MLP" -> path of the module
        self.inner: set[str] = set()

    def rows(self, x: Tensor | None) -> Tensor | None:
        """Activations as rows (N S, width) in double precision; None if they are not one vector per token."""
        if x is None or not x.is_floating_point():
            return None
        tokens = self.shape[0] * self.shape[1]
        if (x.dim() == 3 and tuple(x.shape[:2]) == self.shape) or (x.dim() == 2 and x.shape[0] == tokens):
            return x.detach().reshape(tokens, x.shape[-1]).double().cpu()
        return None

    def run(
        self, x: Tensor | None = None, changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None
    ) -> dict[str, list[Call]]:
        """Run the block alone, with other input activations or with some module outputs replaced."""
        args, keywords = self.call.args, self.call.keywords
        given = self.call.x if x is None else x
        args, keywords = with_input(args, keywords, given.clone())  # type: ignore[union-attr]
        with Recorder(self.block, changes) as recorder:
            self.block(*args, **keywords)
        return recorder.calls

    def noise(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """Add noise to activations at the given rows (None: at all rows), in proportion to the size of each row."""
        flat = x.reshape(self.shape[0] * self.shape[1], -1)
        size = flat.float().pow(2).mean(1, keepdim=True).sqrt().clamp_min(1e-3)
        change = NOISE * size * torch.randn(flat.shape, generator=self.generator).to(flat.device)
        if rows is not None:
            change = change * rows.to(flat.device)[:, None]
        return (flat + change.to(flat.dtype)).reshape(x.shape)

    def rounding(self) -> float:
        """The largest difference allowed between two computations of the same sum, relative to its largest term."""
        numbers = [z for z in (self.call.x, *self.block.parameters()) if z is not None and z.is_floating_point()]
        return max(2 * max(torch.finfo(z.dtype).eps for z in numbers), 1e-6)

    def changed(self, before: Tensor, after: Tensor | None, rows: Tensor | None = None) -> bool:
        """Whether a change of the inputs changed these activations by more than rounding."""
        if after is None:
            return True
        difference = (after - before).norm(dim=1) / before.norm(dim=1).clamp_min(1e-30)
        return bool((difference if rows is None else difference[rows]).max() > 4 * self.rounding())

    def unsound(self) -> str | None:
        """The reason why a run of the block alone is not conclusive; None if it is."""
        assert self.resid_pre is not None and self.resid_post is not None and self.call.x is not None
        if self.resid_pre.shape != self.resid_post.shape:
            return f"the block reads {self.resid_pre.shape[1]} numbers per token and returns {self.resid_post.shape[1]}"
        if "" not in self.y or self.changed(self.resid_post, self.y[""]):
            return "the block returns different activations when it is run again"
        return None

    def reads_later_tokens(self) -> bool:
        """Whether changing the last token changes the block's output at earlier tokens."""
        assert self.call.x is not None and self.resid_post is not None
        positions = torch.arange(len(self.later_rows)).remainder(self.shape[1])
        is_last = positions == self.shape[1] - 1
        y = self.rows(self.run(self.noise(self.call.x, is_last))[""][0].y)
        return "" in self.y and self.changed(self.y[""], y, ~is_last)

    def find_parts(self) -> None:
        """Find attn_out, mlp_out and resid_mid."""
        error, first, second = self.nearest_pair()
        alone_error, alone = self.nearest_single()
        if alone_error <= self.rounding() and alone_error <= error:
            self.find_single_part(alone)
            return
        if error > self.rounding():
            self.find_unproved_parts()
            self.refuse(self.not_added(error, first, second), "attn_out", "mlp_out", "resid_mid")
            return
        first, second = sorted((first, second), key=self.order.__getitem__)
        reads_first = self.changed(self.y[second], self.y_with(second, {first: self.noise}))
        first_mixes = self.mixes(first, {})
        kept = self.calls[first].y
        second_mixes = self.mixes(second, {first: lambda y: kept if y.shape == kept.shape else y})  # type: ignore
        if first_mixes == second_mixes:
            how = "both read" if first_mixes else "neither reads"
            why = f"the block adds {first} and {second}, and {how} earlier tokens, so they are not attention and MLP"
            self.refuse(why, "attn_out", "mlp_out", "resid_mid")
            return
        attention, mlp = (first, second) if first_mixes else (second, first)
        self.parts = {"attention": attention, "MLP": mlp}
        self.add("attn_out", attention)
        self.add("mlp_out", mlp)
        self.found.is_parallel = not reads_first
        self.find_middle(attention, mlp, reads_first)

    def not_added(self, error: float, one: str, other: str) -> str:
        """Explain why the block's output is not resid_pre plus the outputs of two modules."""
        if len(self.parts) == 2:
            assert self.resid_pre is not None and self.resid_post is not None
            one, other = self.parts.values()
            error = self.distance(self.resid_pre + self.y[one] + self.y[other], self.resid_post, one, other)
        if not one:
            return "none of its modules returns activations as wide as the residual stream"
        return f"the relative difference between resid_pre + {one} + {other} and resid_post is {error:.2g}"

    def find_middle(self, attention: str, mlp: str, is_sequential: bool) -> None:
        """Find the module that reads resid_mid."""
        assert self.resid_pre is not None
        if not is_sequential:
            why = "attention and MLP read the same input, so there is no residual stream between them"
            self.refuse(why, "resid_mid")
            return
        if self.order[mlp] < self.order[attention]:
            self.refuse("the MLP comes before the attention", "resid_mid")
            return
        middle = self.resid_pre + self.y[attention]
        readers = [
            path for path in self.x
            if self.order[path] > self.order[attention] and path != "" and self.x[path].shape == middle.shape
            and self.distance(self.x[path], middle) <= self.rounding()
        ]  # fmt: skip
        if readers:
            path = min(readers, key=lambda one: (one.count("."), self.order[one]))
            self.found.sites["resid_mid"] = self.site(path, is_input=True)
        else:
            self.refuse("no module reads resid_pre + attn_out", "resid_mid")

    def find_single_part(self, path: str) -> None:
        """Find the sites of a block that adds the output of only one module, `path`, to the residual stream."""
        if self.mixes(path, {}):
            self.parts = {"attention": path}
            self.add("attn_out", path)
            why = f"the block has no MLP (resid_pre + {path} = resid_post)"
            self.refuse(why, "mlp_in", "mlp_hidden", "mlp_out", "resid_mid")
        else:
            self.parts = {"MLP": path}
            self.add("mlp_out", path)
            why = f"the block has no attention (resid_pre + {path} = resid_post)"
            self.refuse(why, "attn_out", "attn_z", "resid_mid")

    def find_unproved_parts(self) -> None:
        """Find the attention and the MLP of a block that does more than add their outputs to the residual stream.

        Each is found only if the block has a single candidate for it.
        """
        assert self.resid_post is not None
        matrices = {
            path: sum(p.dim() >= 2 for p in self.block.get_submodule(path).parameters())
            for path in self.y
            if path and "." not in path and path in self.x and self.y[path].shape == self.resid_post.shape
        }  # fmt: skip
        mixing = [path for path, count in matrices.items() if count and self.mixes_alone(path)]
        others = [path for path, count in matrices.items() if count > 1 and path not in mixing]
        for part, paths in (("attention", mixing), ("MLP", others)):
            if len(paths) == 1:
                self.parts[part] = paths[0]

    def find_projections(self) -> None:
        """Find attn_z, mlp_hidden and mlp_in."""
        for part, site in (("attention", "attn_z"), ("MLP", "mlp_hidden")):
            if site in self.found.refused:
                continue
            if part not in self.parts:
                self.refuse(f"no single module of the block is its {part}", site)
            elif projection := self.projection(part):
                self.found.sites[site] = self.site(projection, is_input=True)
            else:
                what = "a mixture of experts has several" if part == "MLP" else "it cannot be told from the numbers"
                self.refuse(f"the {part} does not end in one linear map ({what})", site)
        if "mlp_in" not in self.found.refused:
            self.find_mlp_in()

    def find_mlp_in(self) -> None:
        """Find the module whose input is mlp_in."""
        reader = self.mlp_reader()
        if reader is None or reader not in self.x:
            self.refuse("no single module of the block is its MLP", "mlp_in")
        else:
            self.found.sites["mlp_in"] = self.site(reader, is_input=True)

    def mlp_reader(self) -> str | None:
        if "MLP" not in self.parts:
            return None
        attention_top = self.parts.get("attention", "").split(".")[0]
        chain, _ = self.chain("MLP")
        projection = self.projection("MLP")
        source = projection or (chain[-1] if chain else None)
        if source is None:
            return None
        top = source.split(".")[0]
        if top != attention_top and (top != source or not self.is_linear(top)):
            return top
        # In OPT, for example, the MLP is not a module; the MLP's input is the input of the first linear map after the
        # attention.
        start = self.order[self.parts["attention"]] if "attention" in self.parts and not self.found.is_parallel else -1
        inside = f"{attention_top}."
        linear = [
            path for path in self.x
            if start < self.order[path] <= self.order[source] and not f"{path}.".startswith(inside) and path
            and self.is_linear(path)
        ]  # fmt: skip
        return linear[0] if linear else None

    def projection(self, part: str) -> str | None:
        """The linear map at the end of a part."""
        return self.chain(part)[1]

    def chain(self, part: str) -> tuple[list[str], str | None]:
        """The modules that compute a part's output, last one first, and the linear map if the chain ends in one."""
        chain: list[str] = []
        target = self.y[self.parts[part]]
        for _ in range(4):  # the last norm and what it reads
            same = [path for path in self.y if path and path in self.x and torch.equal(self.y[path], target)]
            linear = [path for path in same if self.is_linear(path)]
            if linear:
                return [*chain, linear[0]], linear[0]
            if same:
                chain.append(min(same, key=lambda one: (one.count("."), self.order[one])))
            norms = [path for path in same if self.is_norm(path)]
            if not norms:
                break
            target = self.x[norms[0]]
        return chain, None

    def is_norm(self, path: str) -> bool:
        """Whether a module returns the same output for an input and for twice that input.

        The input is large, so that the eps of a norm does not matter.
        """
        x = self.calls[path].x
        if x is None or self.x[path].shape != self.y[path].shape:
            return False
        x = 100 * x / x.float().pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12).to(x.dtype)
        once, twice = (self.rows(output_tensor(self.rerun(path, scale * x))) for scale in (1, 2))
        return once is not None and twice is not None and self.distance(once, twice) < 0.01 + self.rounding()

    def is_linear(self, path: str) -> bool:
        """Whether a module is affine (a matrix and a bias), judged by its outputs."""
        module, call = self.block.get_submodule(path), self.calls[path]
        if call.x is None or torch.equal(self.x[path], self.y.get(path, torch.empty(0))):
            return False
        if not any(p.dim() >= 2 for p in module.parameters()) or path not in self.y:
            return False
        try:
            outputs = [self.rows(output_tensor(self.rerun(path, scale * call.x))) for scale in (0.0, 1.0, 2.0)]
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
        if any(y is None for y in outputs):
            return False
        zero, one, two = outputs
        return self.distance(two - zero, 2 * (one - zero)) < 8 * self.rounding()  # type: ignore[operator]

    def rerun(self, path: str, x: Tensor) -> Any:
        call = self.calls[path]
        args, keywords = with_input(call.args, call.keywords, x.clone())
        return self.block.get_submodule(path)(*args, **keywords)

    def mixes_alone(self, path: str) -> bool:
        """Whether a module's output at a token depends on its input at earlier tokens."""
        call = self.calls[path]
        try:
            y = self.rows(output_tensor(self.rerun(path, self.noise(call.x, ~self.later_rows))))  # type: ignore
        except (RuntimeError, ValueError, TypeError, IndexError):
            return False
        return self.changed(self.y[path], y, self.later_rows)

    def mixes(self, path: str, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> bool:
        """Whether a module's output at a token depends on the block's input at the first token."""
        assert self.call.x is not None
        y = self.y_with(path, changes, self.noise(self.call.x, ~self.later_rows))
        return self.changed(self.y[path], y, self.later_rows)

    def y_with(
        self, path: str, changes: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor | None = None
    ) -> Tensor | None:
        return self.rows(self.run(x, changes)[path][0].y)

    def candidates(self) -> list[str]:
        """The modules with outputs as wide as the residual stream; only the outermost of those with equal outputs."""
        assert self.resid_post is not None
        chosen: list[str] = []
        for path in sorted(self.y, key=lambda one: (one.count("."), self.order[one])):
            y = self.y[path]
            if path and y.shape == self.resid_post.shape and not any(torch.equal(y, self.y[c]) for c in chosen):
                chosen.append(path)
        return chosen

    def nearest_pair(self) -> tuple[float, str, str]:
        """The relative error and the two modules whose outputs, added to resid_pre, come closest to resid_post."""
        assert self.resid_pre is not None and self.resid_post is not None
        best, candidates = (float("inf"), "", ""), self.candidates()
        for number, one in enumerate(candidates):
            for other in candidates[number + 1 :]:
                distance = self.distance(self.resid_pre + self.y[one] + self.y[other], self.resid_post, one, other)
                best = min(best, (distance, one, other), key=lambda found: found[0])
        return best

    def nearest_single(self) -> tuple[float, str]:
        assert self.resid_pre is not None and self.resid_post is not None
        best = (float("inf"), "")
        for one in self.candidates():
            distance = self.distance(self.resid_pre + self.y[one], self.resid_post, one)
            best = min(best, (distance, one), key=lambda found: found[0])
        return best

    def distance(self, one: Tensor, other: Tensor, *terms: str) -> float:
        """The largest relative distance between matching rows.

        The distance between two rows is divided by the largest of their norms and the norms of this row of each term.
        """
        norms = [z.norm(dim=1) for z in (one, other, *(self.y[path] for path in terms))]
        return float(((one - other).norm(dim=1) / torch.stack(norms).max(0).values.clamp_min(1e-30)).max())

    def site(self, path: str, *, is_input: bool) -> Site:
        call = self.calls[path]
        x = call.x if is_input else call.y
        assert x is not None
        return Site(path, is_input, x.shape[-1], x.dim() == 2)

    def add(self, site: str, path: str) -> None:
        self.found.sites[site] = self.site(path, is_input=False)

    def refuse(self, why: str, *sites: str) -> None:
        for site in sites:
            self.found.refused.setdefault(site, why)
