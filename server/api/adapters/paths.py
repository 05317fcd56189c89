"""Names of adapters in the paths of routes, where `/` belongs to the name: `/v1/adapters/org/name/versions`."""

from starlette.convertors import Convertor, register_url_convertor

from adapters.names import ROUTE_WORDS


class AdapterName(Convertor[str]):
    """`{name:adapter}`: parts between slashes, of which only the first may be a word of a route. A slash may be
    percent-encoded or not: both arrive decoded, and `check_name` refuses names that would be ambiguous."""

    regex = rf"[^/]+(?:/(?!(?:{'|'.join(ROUTE_WORDS)})(?:/|$))[^/]+)*"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("adapter", AdapterName())
NAME, ALIAS = "/{name:adapter}", "/{alias:adapter}"
