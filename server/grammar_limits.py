"""Limits of a grammar's parser, in the process that checks a grammar and in the engine alike.

At most this much memory and time are spent on a grammar as a whole and on one token; a grammar that needs more is
refused, or ends its own request. The numbers are llguidance's defaults, written down because they bound what a request
can cost.
"""

PARSER_LIMITS = {
    "max_grammar_size": 500_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_items_in_row": 2_000,
    "max_lexer_states": 250_000,
}
