"""Mistakes that newcomers make on tinyworld, as little programs. `# <-` marks the line that the error must name.

Where no line is marked it is the first. Each mistake has words that its message must contain: what was wrong, with the
numbers, and what to write instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PROMPT = "The Eiffel Tower is in the city of"
MARK = "# <-"


@dataclass(frozen=True, slots=True)
class Mistake:
    """A program that cannot be honoured."""

    name: str
    program: str
    words: tuple[str, ...]

    @property
    def line(self) -> int:
        """The line that is to blame."""
        lines = self.program.splitlines()
        return next((number for number, text in enumerate(lines, 1) if MARK in text), 1)

    def make(self, names: dict[str, Any]) -> None:
        """Runs the program, as a notebook would."""
        exec(compile(self.program, "notebook.py", "exec"), dict(names))


def inside(name: str, *lines: str, words: tuple[str, ...]) -> Mistake:
    """A mistake inside of a trace on one prompt that saves its logits."""
    body = "\n".join(f"    {line}" for line in (*lines, "model.lm_head.output[:, -1].save()"))
    return Mistake(name, f"with model.trace({PROMPT!r}) as tracer:\n{body}\n", words)


def program(name: str, *lines: str, words: tuple[str, ...]) -> Mistake:
    """A mistake as it stands."""
    return Mistake(name, "\n".join(lines) + "\n", words)


HIDDEN = "h = model.model.layers[3].output[0]"
RAGGED = "with model.trace(['The Eiffel Tower is in', 'The']) as tracer:"
NO_DATA = "a recorded value has no data yet"

PYTHON_NEEDS_A_NUMBER = (
    inside("if", HIDDEN, "if h.mean() > 0:  # <-", "    h[:] = 0", words=(NO_DATA, "`if`", "torch.where(")),
    inside("while", HIDDEN, "while h.norm() > 1: h = h / 2  # <-", words=(NO_DATA, "`while`")),
    inside("and", HIDDEN, "both = (h > 0) and (h < 1)  # <-", words=(NO_DATA, "`and`")),
    inside("assert", HIDDEN, "assert h.mean() == 0  # <-", words=(NO_DATA, "decide after the block")),
    inside("Python's max", HIDDEN, "x = max(h.mean(), h.std())  # <-", words=(NO_DATA,)),
    inside("in", HIDDEN, "x = 3 in h  # <-", words=("`in`", "look after the block")),
    inside("float", HIDDEN, "x = float(h.mean())  # <-", words=(NO_DATA, "float()", "results.append(value.save())")),
    inside("math.sqrt", HIDDEN, "import math; math.sqrt(h.mean())  # <-", words=(NO_DATA, "float()")),
    inside("int", "x = int(model.lm_head.output.argmax(-1)[0, -1])  # <-", words=(NO_DATA, "int()")),
    inside("range", "for i in range(model.lm_head.output.argmax()): pass  # <-", words=(NO_DATA, "a range")),
    inside("an index into a list", "'ab'[model.lm_head.output.argmax()]  # <-", words=(NO_DATA, "an index")),
    inside("the tokenizer", "model.tokenizer.decode([model.lm_head.output.argmax()])  # <-", words=(NO_DATA,)),
    inside(".item()", HIDDEN, "x = h.mean().item()  # <-", words=(NO_DATA, ".item()", "use it after the block")),
    inside(".tolist()", HIDDEN, "x = h.tolist()  # <-", words=(NO_DATA, ".tolist()")),
    inside(".numpy()", HIDDEN, "x = h.detach().cpu().numpy()  # <-", words=(NO_DATA, ".numpy()")),
    inside("np.array", HIDDEN, "x = np.array(h)  # <-", words=(NO_DATA, "numpy", "after the block")),
    inside("len of a number", HIDDEN, "len(h.mean())  # <-", words=("without dimensions", "torch.stack([a, b])")),
    inside("copy", HIDDEN, "import copy; copy.deepcopy(h)  # <-", words=(".clone()",)),
    inside("torch.save", HIDDEN, "torch.save(h, io.BytesIO())  # <-", words=("save it first",)),
)

TENSORS_OF_THE_CLIENT = (
    program(
        "a tensor of results",
        "results = torch.zeros(8)",
        f"with model.trace({PROMPT!r}):",
        "    results[3] = model.model.layers[3].output.mean()  # <-",
        words=("`tensor[...] = value`", "results.append(value.save())", "torch.stack(results)"),
    ),
    program(
        "a running sum",
        "total = torch.zeros(256)",
        f"with model.trace({PROMPT!r}):",
        "    total += model.model.layers[3].output[:, -1].sum(0)  # <-",
        words=("in-place code", "a tensor or array of yours"),
    ),
    inside("out=", HIDDEN, "torch.add(h, 1, out=torch.zeros(1, 9, 256))  # <-", words=("`out=`",)),
    inside("torch.tensor", HIDDEN, "torch.tensor(h)  # <-", words=(NO_DATA, "torch.stack(results)")),
    inside("a list in torch.tensor", HIDDEN, "torch.tensor([h.mean(), h.std()])  # <-", words=("torch.stack([a, b])",)),
    inside("an object", HIDDEN, "h + object()  # <-", words=("object", "tensors, arrays and numbers")),
    inside("words in an array", HIDDEN, "h + np.array(['a'])  # <-", words=("dtype str", "float32")),
    inside(
        "complex numbers", HIDDEN, "h * torch.zeros(256, dtype=torch.complex64)  # <-", words=("complex64", "float32")
    ),
)

UNKNOWN_NAMES = (
    inside("a module", "model.model.layer[3].output  # <-", words=("'layer'", "did you mean layers?")),
    inside("another family's", "model.transformer.h[3]  # <-", words=("'transformer'", "it has model, lm_head")),
    inside("a child", "model.model.layers[3].attn.output  # <-", words=("'attn'", "self_attn?")),
    inside("outputs", "model.model.layers[3].outputs  # <-", words=("'outputs'", "did you mean output")),
    inside("a method", HIDDEN, "h.meen(-1)  # <-", words=("'meen'", "did you mean mean")),
    inside("a function", HIDDEN, "torch.nn.functional.grid_sample(h, h)  # <-", words=("no operation", "grid_sample")),
    inside("a keyword", HIDDEN, "h.sum(dims=1)  # <-", words=("'dims'", "did you mean dim?")),
    inside("logits", "model.lm_head.logits.save()  # <-", words=("'logits'", "model.logits.save()")),
    inside("what tracer has not", "tracer.output.save()  # <-", words=("'output'", "model.logits.save()")),
    program("a setting", "model.config.n_layers  # <-", words=("'n_layers'", "did you mean num_hidden_layers?")),
    program("a hook", "model.lm_head.register_forward_hook(print)", words=("no hooks", "`.output`", "model.trace(")),
    program("parameters", "model.parameters()", words=("model.lm_head.weight",)),
    program("eval", "model.eval()", words=("as it was loaded or is served",)),
    program("named_modules", "model.named_modules()", words=("print(model)",)),
    program("forward", "model.forward('x')", words=("call the module itself",)),
    program(
        "a path", "model.get_submodule('model.layers.3.attn')", words=("no module 'model.layers.3.attn'", "self_attn")
    ),
)

OUT_OF_RANGE = (
    inside("a layer", "model.model.layers[12].output  # <-", words=("model.layers[12]", "layers 0-7")),
    inside("a layer from the end", "model.model.layers[-9].output  # <-", words=("model.layers[-9]", "layers 0-7")),
    inside("a layer by name", "model.model.layers['3'].output  # <-", words=("['3']", "numbers 0-7")),
    inside("a head", "model.model.layers[3].self_attn.z[:, :, 8] = 0  # <-", words=("8", "dimension 2 with size 8")),
    inside("a position", HIDDEN, "h[:, 20] = 0  # <-", words=("20", "dimension 1 with size 9")),
    inside("positions", HIDDEN, "h[:, [3, 40]] = 0  # <-", words=("40", "dimension 1 with size 9")),
    inside("a position of a prompt", HIDDEN, "h.at(20)  # <-", words=("no position 20", "9 tokens (0-8)")),
    inside("a token", "model.lm_head.output[:, -1, 5000].save()  # <-", words=("5000", "size 3200")),
    program("an id", "with model.trace([1, 5000]): pass", words=("token 5000", "0-3199")),
    program("a context", "with model.trace(list(range(3, 900))): pass", words=("897 tokens", "takes 512")),
    program(
        "a shorter prompt", RAGGED, "    model.lm_head.output.at(4).save()  # <-", words=("position 4 in prompt 1",)
    ),
)

SHAPES = (
    inside(
        "a write", "model.model.layers[3].output = torch.zeros(1, 3, 256)  # <-", words=("[1, 9, 256]", "[1, 3, 256]")
    ),
    inside(
        "no broadcasting", "model.model.layers[3].mlp.output = torch.zeros(256)  # <-", words=("exact shape", "[256]")
    ),
    inside("a number", "model.model.layers[3].mlp.output = 0  # <-", words=("not a int", "site[...] = value")),
    inside("nothing", "model.model.layers[3].mlp.output = None  # <-", words=("NoneType",)),
    inside("a part", HIDDEN, "h[:, -1] = torch.zeros(255)  # <-", words=("[255]", "[1, 256]")),
    inside("a sum", HIDDEN, "(h + torch.zeros(255)).save()  # <-", words=("float32[1, 9, 256]", "float32[255]")),
    inside("a product", HIDDEN, "(h @ torch.zeros(255, 4)).save()  # <-", words=("[255, 4]",)),
    inside("dtypes", HIDDEN, "(h @ torch.zeros(256, 4).double()).save()  # <-", words=("float32 and float64",)),
    inside("a view", HIDDEN, "h.view(1, 9, 7, 32).save()  # <-", words=("[1, 9, 7, 32]", "2304")),
    inside("a stack", HIDDEN, "torch.stack([h, h[:, -1:]]).save()  # <-", words=("equal size", "[1, 1, 256]")),
    inside("a dimension", HIDDEN, "h.softmax(3).save()  # <-", words=("[-3, 2]", "3")),
    inside("k", "model.lm_head.output.topk(5000).values.save()  # <-", words=("topk", "[1, 9, 3200]")),
    inside(
        "a module's input",
        "model.lm_head(model.lm_head.output).save()  # <-",
        words=("calling lm_head", "[1, 9, 3200]"),
    ),
    inside("a probe", HIDDEN, "torch.nn.Linear(255, 3)(h).save()  # <-", words=("float32[3, 255]",)),
    inside("a shape of values", HIDDEN, "h[h > 0].save()  # <-", words=("depends on values", "torch.where")),
    inside(
        "halves of whole numbers", "t = model.lm_head.output.argmax(-1)", "t /= 2  # <-", words=("float32", "int64")
    ),
    inside("too large", HIDDEN, "(h[..., None] * torch.zeros(200000)).sum(-1).save()  # <-", words=("1073741824",)),
    program(
        "ragged",
        RAGGED,
        "    model.lm_head.input.mean(1).save()  # <-",
        words=("pad rows", "tracer.mask", "value.at(pos)"),
    ),
)

FORGOTTEN_OUTPUT = (
    inside("arithmetic", "h = model.model.layers[3] + 1  # <-", words=("is a module, not a value", "`.output`")),
    inside("from the left", "h = 2 * model.model.layers[3].mlp  # <-", words=("model.layers.3.mlp", "`.output`")),
    inside("an index", "h = model.model.layers[3][:, -1]  # <-", words=("is a module", "`.output`")),
    inside("a change", "model.model.layers[3][:, -1] = 0  # <-", words=("is a module", "`.output`")),
    inside("save", "model.model.layers[3].save()  # <-", words=("'save'", "`.output.save`")),
    inside("mean", "model.model.layers[3].mean(-1)  # <-", words=("'mean'", "`.output.mean`")),
    inside("shape", "model.model.layers[3].shape  # <-", words=("'shape'", "`.output.shape`")),
    inside("torch", "torch.relu(model.model.layers[3].mlp)  # <-", words=("is a module", "`.output`")),
    inside("an operand", HIDDEN, "h + model.model.layers[3].mlp  # <-", words=("is a module", "`.output`")),
    inside("a module of a module", "model.lm_head(model.model.norm)  # <-", words=("model.norm", "`.output`")),
    inside("a comparison", HIDDEN, "h == model.model.layers[3]  # <-", words=("is a module", "`.output`")),
    inside("a list", "model.model.layers.output  # <-", words=("list of modules", "model.layers[0].output")),
    inside("a list called", "model.model.layers(model.lm_head.input)  # <-", words=("list of modules",)),
    inside("no list", "for layer in model.model: pass  # <-", words=("not a list of modules", "layers")),
    inside("a tuple", "model.model.layers[3].self_attn.output + 1  # <-", words=("tuple", "`.output[0]`")),
    inside("a tuple's save", "model.model.layers[3].self_attn.output.mean()  # <-", words=("'mean'", "`.output[0]`")),
    inside("a tuple's part", "model.model.layers[3].self_attn.output[:, -1] = 0  # <-", words=("`.output[0]`",)),
    inside("weights", "model.model.layers[3].self_attn.output[1]  # <-", words=("no 1", "`.pattern`")),
    inside("a layer's tuple", "model.model.layers[3].output[1]  # <-", words=("decoder layer", "output[:, -1]")),
    inside("a layer's tuple, unpacked", "h, *rest = model.model.layers[3].output  # <-", words=("`.output[0]`",)),
    inside(
        "attention called", "layer = model.model.layers[3]", "layer.self_attn(layer.input)  # <-", words=("attends",)
    ),
    inside("keywords", "model.lm_head(input=model.lm_head.input)  # <-", words=("without keywords", "lm_head(value)")),
)

CHANGES_THAT_GO_NOWHERE = (
    inside(
        "a copy", "h = model.model.layers[3].output.clone()", "h[:, -1] = 0  # <-", words=("reaches nothing", "copy")
    ),
    inside("an index that copies", HIDDEN, "part = h[:, [1, 2]]", "part.zero_()  # <-", words=("reaches nothing",)),
    inside("a weight", "model.lm_head.weight[0] = 0  # <-", words=("lm_head.weight is a copy", "`.output`")),
    inside("a weight set", "model.lm_head.weight = torch.zeros(1)  # <-", words=("lm_head.weight cannot be set",)),
    inside("a module set", "model.model.layers[3].mlp = None  # <-", words=("mlp cannot be set", "`.output`")),
    inside("a layer set", "model.model.layers[3] = model.model.layers[2]  # <-", words=("list of modules",)),
    inside("a layer deleted", "del model.model.layers[3]  # <-", words=("list of modules",)),
    inside(
        "an older read",
        HIDDEN,
        "model.model.layers[3].output[:] = 0",
        "h[:] = 1  # <-",
        words=("notebook.py:3", "again"),
    ),
    inside("token ids", "model.model.embed_tokens.input[:] = 5  # <-", words=("cannot be written", "token ids")),
    inside(
        "a cycle",
        "h = model.model.layers[5].output",
        "model.model.layers[2].output[:] = h  # <-",
        words=("a cycle", "tracer.invoke"),
    ),
    inside(
        "later tokens",
        "model.model.layers[3].self_attn.pattern[:, :, 2, 5] = 1.0  # <-",
        words=("column 2", "column 5"),
    ),
)

SAVES = (
    program(
        "nothing saved",
        f"with model.trace({PROMPT!r}):",
        "    model.lm_head.output",
        words=("saves nothing", ".save()"),
    ),
    program("save without ()", f"with model.trace({PROMPT!r}):", "    model.lm_head.output.save", words=(".save()",)),
    program(
        "not saved",
        f"with model.trace({PROMPT!r}):",
        "    h = model.model.layers[3].output",
        "    model.lm_head.output.save()",
        "h.shape  # <-",
        words=("was not saved", ".save()", "notebook.py:2"),
    ),
    program(
        "of another trace",
        f"with model.trace({PROMPT!r}):",
        "    h = model.model.layers[3].output",
        "    model.lm_head.output.save()",
        f"with model.trace({PROMPT!r}):",
        "    model.model.layers[3].output[:] = h  # <-",
        words=("was not saved", ".save()"),
    ),
    program(
        "of a trace that failed",
        "try:",
        f"    with model.trace({PROMPT!r}):",
        "        h = model.model.layers[3].output.save()",
        "        1 / 0",
        "except ZeroDivisionError: pass",
        "float(h.mean())  # <-",
        words=("ended with ZeroDivisionError", "notebook.py:3"),
    ),
    inside("the receipt inside", "tracer.receipt.result_bytes  # <-", words=("when its block ends",)),
    inside("backward", "model.lm_head.output.backward()  # <-", words=("one number", ".sum()", "gradient=")),
    inside("requires_grad", HIDDEN, "h.requires_grad = False  # <-", words=(".detach()",)),
    inside("grad", HIDDEN, "h.grad  # <-", words=("loss.backward()",)),
    inside(
        "create_graph",
        "model.lm_head.output.sum().backward(create_graph=True)  # <-",
        words=("gradients of gradients",),
    ),
    inside("a weight's gradient", "model.lm_head.weight.grad  # <-", words=("weights are frozen", "`.input`")),
    inside(
        "gradients of no value",
        "torch.autograd.grad(model.lm_head.output.sum(), torch.ones(3))  # <-",
        words=("requires_grad=True",),
    ),
)

TRACES = (
    program("outside", "model.model.layers[3].output", words=("inside a trace", "with model.trace(prompt):")),
    program("a write outside", "model.model.layers[3].output = torch.zeros(1)", words=("inside a trace",)),
    program("a weight outside", "model.lm_head.weight", words=("inside a trace",)),
    program("a module called outside", "model.lm_head(torch.zeros(1, 256))", words=("inside a trace",)),
    program("no with", "tracer = model.trace('a')", "model.lm_head.output  # <-", words=("with model.trace(prompt):",)),
    inside("a trace in a trace", "with model.trace('a'): pass  # <-", words=("notebook.py:1", "one ends before")),
    inside("invoke after prompts", "with tracer.invoke('a'): pass  # <-", words=("model.trace() without any",)),
    program("no prompts", "with model.trace():", "    model.lm_head.output  # <-", words=("tracer.invoke(prompts)",)),
    program(
        "an invoke in an invoke",
        "with model.trace() as tracer:",
        "    with tracer.invoke('a'):",
        "        with tracer.invoke('b'): pass  # <-",
        words=("one ends before the next begins",),
    ),
    program(
        "a used trace",
        "tracer = model.trace('a')",
        "with tracer: model.lm_head.output.save()",
        "with tracer: model.lm_head.output.save()  # <-",
        words=("has been used", "model.trace(...)"),
    ),
    program(
        "a prompt of the model's making",
        "with model.trace() as tracer:",
        "    with tracer.invoke('a'): ids = model.lm_head.output.argmax(-1)",
        "    with tracer.invoke(ids): pass  # <-",
        words=("prompts are known before", "a trace of its own after the block"),
    ),
    program(
        "the mask of nobody",
        "with model.trace() as tracer:",
        "    with tracer.invoke('a'): model.lm_head.output.save()",
        "    tracer.mask  # <-",
        words=("the mask belongs to prompts",),
    ),
    program("a number", "with model.trace(5): pass", words=("prompts are a string", "not a int")),
    program("no prompt", "with model.trace([]): pass", words=("no prompts",)),
    program("floats", "with model.trace(torch.zeros(3)): pass", words=("integers", "float32")),
    program("words and ids", "with model.trace(['a', 3]): pass", words=("all strings or all token ids",)),
    program("a seed", "with model.trace('a', seed=-1): pass", words=("seed", "-1")),
    program("sharing", "with model.trace('a', sharing='no'): pass", words=("'off'", "'no'")),
)

AROUND_TRACES = (
    inside(
        "an operation", "model.model.layers[3].mlp.source.self_act_fn_0 + 1  # <-", words=("operation", "`.output`")
    ),
    inside("an operation's save", "model.lm_head.source.F_linear_0.save()  # <-", words=("has output", "'save'")),
    inside("a cache inside", "tracer.cache()['lm_head']  # <-", words=("when the block has ended",)),
    program(
        "a cache without it",
        f"with model.trace({PROMPT!r}) as tracer: cache = tracer.cache(modules=['model.layers.3'])",
        "cache['model.layers.4']  # <-",
        words=("model.layers.4: not in this cache", "did you mean model.layers.3?"),
    ),
    program("a prompt's price", "model.validate('a')", words=("a trace, not a str", "run=False")),
    program(
        "nnsight's pair", "with model.edit() as (tracer, edited): pass", words=("the edited model alone", "as edited:")
    ),
    program("an edit's save", "with model.edit(): model.lm_head.output.save()", words=("gives nothing back",)),
    program("an edit of nothing", "with model.edit(): pass", words=("writes nothing",)),
    program(
        "a number of a session",
        "with model.session():",
        f"    with model.trace({PROMPT!r}): h = model.lm_head.output.mean().save()",
        "    float(h)  # <-",
        words=("this session sends when its block ends", "peek=True"),
    ),
    inside(
        "inside of what is skipped",
        "layer = model.model.layers[3]",
        "layer.skip(layer.input)",
        "layer.mlp.output  # <-",
        words=("is skipped", "notebook.py:3"),
    ),
    inside(
        "behind a stop",
        "model.model.layers[0].output.save()",
        "tracer.stop()",
        "model.lm_head.output  # <-",
        words=("tracer.stop() at notebook.py:3",),
    ),
    inside("a number of cond", HIDDEN, "polytrace.cond(h.mean() > 0, 1, 2)  # <-", words=("torch.full_like",)),
    program(
        "nobody's invoke",
        "with model.trace() as tracer:",
        "    with tracer.invoke(): pass  # <-",
        words=("there are none yet",),
    ),
    program(
        "a write behind a look",
        f"with model.trace({PROMPT!r}, peek=True):",
        "    if model.model.layers[3].output.mean() > 0: pass",
        "    model.model.layers[1].output[:] = 0  # <-",
        words=("was looked at", "before you look"),
    ),
)

GROUPS = {
    "around": AROUND_TRACES,
    "python": PYTHON_NEEDS_A_NUMBER,
    "client": TENSORS_OF_THE_CLIENT,
    "names": UNKNOWN_NAMES,
    "ranges": OUT_OF_RANGE,
    "shapes": SHAPES,
    "output": FORGOTTEN_OUTPUT,
    "changes": CHANGES_THAT_GO_NOWHERE,
    "saves": SAVES,
    "traces": TRACES,
}
MISTAKES = {f"{group}: {mistake.name}": mistake for group, mistakes in GROUPS.items() for mistake in mistakes}
