"""What a row of a table trains: methods of the library by name, with options, in one of three places."""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optax

import mtl_optax as mtl
from examples.studies.harness.command import unknown
from examples.studies.harness.errors import UserError

SINGLE, SUM = "single", "sum"
LOSSES, REPRESENTATION, PARAMETERS = "losses", "representation", "parameters"
PLACES = (LOSSES, REPRESENTATION, PARAMETERS)
# The methods whose paper puts them on the representation.
ON_REPRESENTATION = ("multibalance",)
# The methods that take Adam's place on the shared bottom.
IN_PLACE_OF_ADAM = ("adatask", "scale_by_mtadam")
# The methods whose papers weight the losses, and so the towers too.
WEIGHS_HEADS = ("emtl", "mgda", "nash_mtl")
# Its weights come from the residuals of a regression, which a ranking loss does not have.
WITHOUT_USE = ("ntk",)
# The choices that some methods leave to the user, and defaults that do not fit every number of tasks.
ARGUMENTS: dict[str, Callable[[int, optax.GradientTransformation], dict[str, Any]]] = {
    "adatask": lambda num_tasks, scaler: {"inner": scaler},
    "fixed_weights": lambda num_tasks, scaler: {"weights": [1.0] * num_tasks},
    "go4align": lambda num_tasks, scaler: {"num_groups": min(2, num_tasks)},
    # The target is what is minimised; guessing costs the other tasks log(2) = 0.69.
    "lagrangian": lambda num_tasks, scaler: {
        "limits": [None] + [0.5] * (num_tasks - 1),
        "step_size": 0.1,
    },
    "trimmed_mean": lambda num_tasks, scaler: {"trim_number": min(1, (num_tasks - 1) // 2)},
}


def known_methods() -> tuple[str, ...]:
    """The names that a choice may use: single, sum, and the methods of the library."""
    return (SINGLE, SUM, *(name for name in mtl.METHODS if name not in WITHOUT_USE))


@dataclass(frozen=True)
class Choice:
    """A method, or several in a chain, and where it stands.

    Attributes:
      label: as it was written, for tables.
      parts: names and options, from the task gradients to the update.
      place: one of `PLACES`, or None for the place that the method's paper has.
    """

    label: str
    parts: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = field(hash=False)  # may hold lists
    place: str | None = None

    @property
    def name(self) -> str:
        """The name of the last method."""
        return self.parts[-1][0]

    def method(
        self, num_tasks: int, scaler: optax.GradientTransformation, knobs: Mapping[str, Any]
    ) -> mtl.Method | optax.GradientTransformationExtraArgs:
        """The method; `knobs` are more options, which may be traced numbers.

        A knob is an option of the first part: in a chain, that is the method the others refine.
        """
        made = []
        for number, (name, options) in enumerate(self.parts, start=1):
            arguments = ARGUMENTS[name](num_tasks, scaler) if name in ARGUMENTS else {}
            arguments |= dict(options)
            if number == 1:
                arguments |= knobs
            if number < len(self.parts):
                arguments["reduce"] = False  # the next one needs the task axis
            made.append(_factory(name, num_tasks, arguments))
        return made[0] if len(made) == 1 else optax.chain(*made)


def _factory(name: str, num_tasks: int, arguments: dict[str, Any]) -> mtl.Method:
    if name in (SUM, SINGLE) and arguments:
        raise TypeError(f"{name} takes no options; found {', '.join(arguments)}")
    if name == SUM:
        return mtl.sum_tasks(num_tasks)
    if name == SINGLE:
        # The same batches as every other row: only the losses of the other tasks do not count.
        return mtl.fixed_weights(num_tasks, [1.0] + [0.0] * (num_tasks - 1))
    if isinstance(arguments.get("base"), str):  # a method that another one is built on
        base = parse_choice(arguments["base"])
        arguments = arguments | {"base": base.method(num_tasks, optax.identity(), {})}
    return mtl.METHODS[name].factory(num_tasks, **arguments)


def parse_choice(text: str) -> Choice:
    """Read `metabalance`, `metabalance(relax_factor=1)` or `metabalance + grad_surgery`.

    The option `place=` puts a method on the "losses", the "representation" or the "parameters"; the others
    go to the method's factory. The method that `base=` asks for is a string: `emtl(base="mgda")`.
    """
    place, parts = None, []
    for name, options in _read_chain(text):
        if name not in known_methods():
            raise UserError(unknown("method", name, known_methods()))
        place = options.pop("place", place)
        parts.append((name, tuple(options.items())))
    if any(name in (SINGLE, SUM) for name, _ in parts[:-1]):
        raise UserError(f"--method {text}: {SINGLE} and {SUM} can only end a chain")
    if place is not None and place not in PLACES:
        raise UserError(f"--method {text}: place= is one of {', '.join(PLACES)}, not {place!r}")
    return Choice(text, tuple(parts), place)


def _read_chain(text: str) -> list[tuple[str, dict[str, Any]]]:
    """The names and options, from the first method to the last."""
    usage = UserError(f"--method {text}: write name or name(option=value)")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise usage from None
    calls: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        calls.insert(0, tree.right)
        tree = tree.left
    found = []
    for part in (tree, *calls):
        call = part if isinstance(part, ast.Call) else ast.Call(part, [], [])
        named = all(keyword.arg for keyword in call.keywords)
        if not isinstance(call.func, ast.Name) or call.args or not named:
            raise usage
        try:
            options = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
        except (ValueError, TypeError):
            raise UserError(f"--method {text}: an option's value must be a literal") from None
        found.append((call.func.id, options))
    return found
