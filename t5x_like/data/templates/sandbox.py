"""A sandbox for chat templates that came from elsewhere: no code, no files, bounded time and size.

The language is Jinja as tokenizers carry it (transformers' apply_chat_template), in an environment without a loader,
without attributes that begin with an underscore, and with the globals and filters that are listed here alone. Every
round of a loop, every macro, comparison, test and joining of texts is counted against `ROUNDS`, `SECONDS` and `SIZE`,
and nothing is computed while a template is compiled. No list is made that would be longer than SIZE written out, so
that each single operation of Python on one is short. Whatever a template does, it ends with a text of at most SIZE
characters or with a `TemplateRefused`, in one line; with a `ConversationRefused` where the conversation is long itself.
"""

import contextlib
import datetime
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from jinja2.visitor import NodeTransformer

from t5x_like.data.templates import functions
from t5x_like.data.templates.limits import (
    LONG,
    SECONDS,
    SIZE,
    ConversationRefused,
    Limit,
    Meter,
    TemplateRefused,
    written_out,
)

OPEN, CLOSE = "\ufdd0", "\ufdd1"  # around what {% generation %} marks: noncharacters, which no text holds


class Template:
    """A compiled template. Raises TemplateRefused where it is no Jinja, or asks for what the sandbox has not."""

    def __init__(self, source: str, *, now: datetime.datetime | None = None):
        """now: what strftime_now tells, None for the time of each call."""
        self._environment = _Environment(now)
        self._lock = threading.Lock()
        self._environment.meter.start()
        with _one_line():
            self._template = self._environment.from_string(source)

    def render(self, values: Mapping[str, Any]) -> str:
        """`values`: plain JSON values alone."""
        with self._lock, _one_line():
            self._environment.meter.start()
            pieces = []
            try:
                for piece in self._template.generate(**values):
                    self._environment.meter.add(len(piece))
                    pieces.append(piece)
            except Limit as error:
                size = written_out(values)
                if size <= LONG:
                    raise
                raise ConversationRefused(f"it is of {size} characters and entries, too long: {error}") from None
            return "".join(pieces)


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (TemplateRefused, ConversationRefused):
        raise
    except jinja2.TemplateSyntaxError as error:
        raise TemplateRefused(f"line {error.lineno} is no Jinja: {_line(error)}") from None
    except jinja2.exceptions.SecurityError as error:
        raise TemplateRefused(f"it asks for what no template may do: {_line(error)}") from None
    except RecursionError:
        raise TemplateRefused("its macros call each other without end") from None
    except Exception as error:  # a template may raise whatever its expressions do
        raise ConversationRefused(f"{type(error).__name__}: {_line(error)}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


class _Counted(NodeTransformer):
    """Puts a count into every loop, macro and comparison, and has functions look at the size of texts that are joined
    and of lists that are written down."""

    def visit_For(self, node: Any) -> Any:
        return self._ticking(node)

    def visit_Macro(self, node: Any) -> Any:
        return self._ticking(node)

    def visit_CallBlock(self, node: Any) -> Any:
        return self._ticking(node)

    def visit_Concat(self, node: Any) -> Any:
        node = self.generic_visit(node)
        return _call("concatenate", node.nodes, node.lineno)

    def visit_Getitem(self, node: Any) -> Any:
        node = self.generic_visit(node)
        sliced = isinstance(node.arg, jinja2.nodes.Slice)
        return _call("measured", [node], node.lineno) if sliced else node

    def visit_List(self, node: Any) -> Any:
        return self._measured(node)

    def visit_Dict(self, node: Any) -> Any:
        return self._measured(node)

    def visit_Tuple(self, node: Any) -> Any:
        return self._measured(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Name(self, node: Any) -> Any:
        of_macro = node.ctx == "load" and node.name in ("varargs", "kwargs")
        return _call("measured", [node], node.lineno) if of_macro else node

    def visit_Compare(self, node: Any) -> Any:
        node = self.generic_visit(node)
        node.expr = _call("timed", [node.expr], node.lineno)
        return node

    def _measured(self, node: Any) -> Any:
        return _call("measured", [self.generic_visit(node)], node.lineno)

    def _ticking(self, node: Any) -> Any:
        node = self.generic_visit(node)
        tick = jinja2.nodes.ExprStmt(_call("tick", [], node.lineno), lineno=node.lineno)
        node.body = [tick, *node.body]
        return node


def _call(name: str, arguments: list[Any], line: int) -> Any:
    function = jinja2.nodes.EnvironmentAttribute(name, lineno=line)
    return jinja2.nodes.Call(function, arguments, [], None, None, lineno=line)


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: what is between them the assistant wrote."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


_OF_FILES = (jinja2.nodes.Include, jinja2.nodes.Import, jinja2.nodes.FromImport, jinja2.nodes.Extends)
_STRING_METHODS = frozenset(
    "capitalize count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle isupper "
    "join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip swapcase title upper".split()
)
# Filters that give no more than they are given, and those of the table below.
_FILTERS = (
    "abs attr capitalize count d default dictsort e escape first float groupby int items last length list lower map "
    "max min reject rejectattr reverse round safe select selectattr sort title trim unique upper".split()
)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """`concat`, `concatenate`, `measured`, `timed` and `tick` are called by compiled templates."""

    intercepted_binops = frozenset("+ * ** %".split())

    def __init__(self, now: datetime.datetime | None):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            cache_size=0,
            optimized=False,
        )
        meter = self.meter = Meter()
        # With a context it is called when a template is rendered alone, and nothing is computed before.
        self.finalize = jinja2.pass_context(lambda context, value: meter.whole(value))
        self.concat = self._concat
        meter.start()
        own = {"tojson": functions.tojson(meter), "replace": self._replace, "join": self._join, "indent": self._indent}
        own |= {"string": lambda value: str(meter.whole(value)), "sum": functions.total, "round": functions.round_to}
        filters = {name: self.filters[name] for name in _FILTERS} | own
        self.filters = {name: self._counted(function) for name, function in filters.items()}
        self.tests = {name: self._counted(function) for name, function in self.tests.items()}
        namespace = {"dict": functions.Dictionary(), "namespace": functions.Namespace, "range": self.globals["range"]}
        moment = functions.moment(now)
        self.globals = namespace | {"raise_exception": functions.raise_exception, "strftime_now": moment}

    def tick(self) -> str:
        return self.meter.tick()

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.meter.tick()
            return self.meter.sized(function(*args, **kwargs))

        return counted

    def measured(self, value: Any) -> Any:
        return self.meter.sized(value)

    def timed(self, value: Any) -> Any:
        self.meter.look()
        return value

    def _concat(self, pieces: Iterable[str]) -> str:
        """What a block or a macro has written."""
        listed = [*pieces]
        self.meter.check(sum(map(len, listed)))
        return self.meter.sized("".join(listed))

    def concatenate(self, *values: Any) -> str:
        texts = [str(self.meter.whole(value)) for value in values]
        self.meter.check(sum(map(len, texts)))
        return self.meter.sized("".join(texts))

    def _parse(self, source: str, name: Any, filename: Any) -> Any:
        tree = super()._parse(source, name, filename)
        if next(tree.find_all(_OF_FILES), None) is not None:
            raise TemplateRefused("it asks for another file")
        return _Counted().visit(tree)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STRING_METHODS
        return super().is_safe_attribute(obj, attr, value) and attr != "format_map"

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise jinja2.exceptions.SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__}")

    def wrap_str_format(self, value: Any) -> None:
        """`format` is no method that a template has: it pads to any width."""

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.meter.look()
        sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
        if operator in ("**", "%") and sizes:
            raise TemplateRefused(f"{operator} of texts or lists is not supported")
        if operator == "**":
            self.meter.check(SIZE + 1 if functions.large(left) or functions.large(right, 64) else 0)
        if operator == "*":
            times = next((side for side in (left, right) if isinstance(side, int)), 0)
            self.meter.check(max(sizes, default=0) * times)
            self.meter.check(SIZE + 1 if not sizes and (functions.large(left) or functions.large(right)) else 0)
        return self.meter.sized(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902
        __self.meter.tick()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if owner is __self:  # what the compiled template calls looks at sizes itself
            return __obj(*args)
        if isinstance(owner, str) and name == "replace" and len(args) > 1:
            return __self._replace(owner, *args)
        if isinstance(owner, str) and name == "join" and args:
            return __self._join(args[0], owner)
        return __self.meter.sized(super().call(__context, __obj, *args, **kwargs))

    def _replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        text, old, new = str(text), str(old), str(new)
        self.meter.check(len(text) + text.count(old) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def _join(self, values: Any, between: str = "", attribute: str | None = None) -> str:
        listed = [value[attribute] if attribute is not None else value for value in values]
        texts = [str(self.meter.whole(value)) for value in listed]
        self.meter.check(sum(map(len, texts)) + len(texts) * len(between))
        return between.join(texts)

    def _indent(self, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        begin = width if isinstance(width, str) else " " * min(width, 1 << 10)
        first_line, *others = f"{text}\n".splitlines()
        self.meter.check(len(text) + (len(others) + 1) * len(begin))
        others = [begin + line if line or blank else line for line in others]
        return "\n".join([begin + first_line if first else first_line, *others])


__all__ = ["CLOSE", "OPEN", "SECONDS", "ConversationRefused", "Template", "TemplateRefused"]
