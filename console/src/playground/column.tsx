import { useSignal, type Signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { count, seconds } from "../format";
import { ModelPicker } from "../picker";
import { Code, Copy, Dialog, Failure } from "../ui";
import { HeatMap } from "./heatmap";
import { Calls, Text } from "./output";
import { bodyOf, wrong } from "./request";
import { LANGUAGES, snippet, type Language } from "./snippets";
import { said, type Answer, type Column } from "./state";

export function AnswerColumn({ column, alone, remove }: { column: Column; alone: boolean; remove: () => void }) {
  const code = useSignal(false);
  const end = useRef<HTMLDivElement>(null);
  const answers = column.answers.value;
  const growing = answers.at(-1)?.value.text.length;
  useEffect(() => {
    const box = end.current!;
    if (box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
  }, [growing, answers.length]);
  return (
    <section class="column" aria-label={column.model.value || "No model"}>
      <header>
        <ModelPicker label="Model" hidden value={column.model.value} choose={(name) => (column.model.value = name)} />
        <button type="button" class="quiet" disabled={!column.model.value || wrong() !== ""} onClick={() => (code.value = true)}>
          Code
        </button>
        {!alone && (
          <button
            type="button"
            class="quiet"
            aria-label={`Remove ${column.model.value || "this model"}`}
            onClick={() => {
              column.stop?.abort();
              remove();
            }}
          >
            ✕
          </button>
        )}
      </header>
      <div class="turns" ref={end} tabIndex={0} role="log" aria-label={`Conversation with ${column.model.value || "no model"}`}>
        {answers.length === 0 && <p class="waiting muted">Its answer appears here.</p>}
        {answers.map((answer, turn) => (
          <Turn key={turn} said={said.value[turn] ?? ""} answer={answer} />
        ))}
      </div>
      <Foot answer={answers.at(-1)?.value ?? null} />
      {code.value && <Request column={column} close={() => (code.value = false)} />}
    </section>
  );
}

function Turn({ said, answer }: { said: string; answer: Signal<Answer> }) {
  const now = answer.value;
  const running = now.ended === null;
  return (
    <div class="turn">
      <p class="said">{said}</p>
      {now.reasoning && (
        <details>
          <summary>Reasoning</summary>
          <p class="muted pre">{now.reasoning}</p>
        </details>
      )}
      <div class={`answer ${running ? "running" : ""}`}>{now.tokens.length ? <HeatMap tokens={now.tokens} /> : <Text text={now.text} done={!running} />}</div>
      <Calls calls={now.calls} done={!running} />
      <Failure error={now.error} />
    </div>
  );
}

const FINISHES: Record<string, string> = { length: "cut at the limit", stopped: "stopped", tool_calls: "calls a function" };

function Foot({ answer }: { answer: Answer | null }) {
  if (answer === null || answer.started === 0) return <footer class="muted">&nbsp;</footer>;
  const { started, first, ended, finish, fingerprint } = answer;
  const took = first !== null && ended ? (ended - first) / 1000 : 0;
  const speed = took > 0 && answer.count > 1 ? `${((answer.count - 1) / took).toFixed(0)}/s` : "";
  const version = fingerprint.split("-")[1] ?? "";
  const facts = [
    first === null ? (ended === null ? "waiting" : "") : seconds((first - started) / 1000),
    speed,
    answer.count ? `${count(answer.count)} tokens` : "",
    finish ? (FINISHES[finish] ?? "") : "",
  ];
  return (
    <footer class="muted">
      <span title="until the first token · tokens per second · tokens">{facts.filter(Boolean).join(" · ") || "\u00a0"}</span>
      {version && <code title="The version that answered">{version}</code>}
    </footer>
  );
}

function Request({ column, close }: { column: Column; close: () => void }) {
  const language = useSignal<Language>("curl");
  const body = bodyOf(column);
  if (said.value.length === 0) body.messages = [...(body.messages as object[]), { role: "user", content: "Hello!" }];
  const text = snippet(language.value, body);
  return (
    <Dialog title={`Ask ${column.model.value} from code`} close={close}>
      <div class="tabs" role="tablist" aria-label="Language">
        {LANGUAGES.map((name) => (
          <button key={name} type="button" role="tab" aria-selected={language.value === name} onClick={() => (language.value = name)}>
            {name}
          </button>
        ))}
      </div>
      <Code label={`The request in ${language.value}`}>{text}</Code>
      <div class="actions">
        <button type="button" class="quiet" onClick={close}>
          Close
        </button>
        <Copy text={() => text} primary>Copy as {language.value}</Copy>
      </div>
    </Dialog>
  );
}
