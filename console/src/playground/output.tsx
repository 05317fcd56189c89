// The text of an answer, of which JSON is laid out, and its calls of functions.
import type { ComponentChild } from "preact";
import { Code } from "../ui";
import type { Call } from "./state";

export function Text({ text, done }: { text: string; done: boolean }) {
  const value = done ? parsed(text) : undefined;
  return value === undefined ? <p class="pre">{text}</p> : <Json value={value} />;
}

/** An object or a list; a number or a word alone is text. */
function parsed(text: string): unknown {
  try {
    const value = JSON.parse(text.trim().replace(/^```(?:json)?\n([\s\S]*)\n```$/, "$1"));
    return typeof value === "object" && value !== null ? value : undefined;
  } catch {
    return undefined;
  }
}

const TOKEN = /("(?:\\.|[^"\\])*")(\s*:)?|\b(?:true|false|null)\b|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?/g;

export function Json({ value }: { value: unknown }) {
  const text = JSON.stringify(value, null, 2);
  const parts: ComponentChild[] = [];
  let end = 0;
  for (const found of text.matchAll(TOKEN)) {
    parts.push(text.slice(end, found.index));
    const [all, string, colon] = found;
    parts.push(<span class={string ? (colon ? "json-name" : "json-text") : "json-value"}>{colon ? string : all}</span>, colon ?? "");
    end = found.index + all.length;
  }
  return (
    <Code label="JSON" json>
      {parts}
      {text.slice(end)}
    </Code>
  );
}

export function Calls({ calls, done }: { calls: Call[]; done: boolean }) {
  return (
    <>
      {calls.map((call, number) => {
        const value = done ? parsed(call.arguments) : undefined;
        return (
          <div class="call" key={number}>
            <p>
              <span class="tag accent">call</span> <code>{call.name}</code>
            </p>
            {value === undefined ? <Code label="Arguments">{call.arguments}</Code> : <Json value={value} />}
          </div>
        );
      })}
    </>
  );
}
