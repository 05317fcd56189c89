// The tokens of an answer, the darker the less the model expected them. The arrow keys move through the alternatives.
import { useSignal } from "@preact/signals";
import type { ScoredToken } from "./state";

const LEAST = 4.6; // of -log p, where the colour is darkest: a probability of 1 %

function surprise(logprob: number): number {
  return Math.min(Math.max(-logprob / LEAST, 0), 1);
}

function chance(logprob: number): string {
  const value = Math.exp(logprob) * 100;
  return `${value >= 99.95 ? "100" : value >= 10 ? value.toFixed(0) : value.toFixed(1)} %`;
}

function visible(token: string): string {
  return token.replaceAll("\n", "⏎").replaceAll(" ", "·") || "∅";
}

export function HeatMap({ tokens }: { tokens: ScoredToken[] }) {
  const at = useSignal<number | null>(null);
  const pressed = (event: KeyboardEvent) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    event.stopPropagation();
    at.value = Math.min(Math.max((at.value ?? -1) + by, 0), tokens.length - 1);
  };
  const chosen = at.value === null ? undefined : tokens[at.value];
  const listed = chosen && (chosen.top.some((one) => one.token === chosen.token) ? chosen.top : [...chosen.top, chosen]);
  return (
    <div class="heat">
      <p class="pre" tabIndex={0} role="group" aria-label="Tokens by probability; the arrow keys show alternatives" onKeyDown={pressed}>
        {tokens.map(({ token, logprob }, number) => (
          <span key={number} class={number === at.value ? "chosen" : ""} style={{ "--heat": surprise(logprob) }} title={chance(logprob)} onClick={() => (at.value = number)}>
            {token}
          </span>
        ))}
      </p>
      <p class="scale muted" aria-hidden="true">
        expected <i /> surprising
      </p>
      {chosen && (
        <ol class="alternatives" aria-live="polite" aria-label={`Alternatives of ${visible(chosen.token)}`}>
          {listed!.map(({ token, logprob }) => (
            <li key={token} class={token === chosen.token ? "chosen" : ""}>
              <code>{visible(token)}</code>
              <i style={{ width: `${Math.exp(logprob) * 100}%` }} />
              <span>{chance(logprob)}</span>
            </li>
          ))}
        </ol>
      )}
    </div>
  );
}
