// Chooses a model by a part of its name, however many there are.
import { useSignal } from "@preact/signals";
import { useEffect, useId, useRef } from "preact/hooks";
import { call } from "./api";
import { base, may } from "./session";
import type { Adapter, Alias, Listed } from "./types";

const SHOWN = 12;
const TYPING_MS = 150;

/** All models that the key may use: for keys that may not list adapters, which are few or know the name. */
async function visible(): Promise<string[]> {
  return (await call<Listed<{ id: string }>>("/v1/models")).data.map((model) => model.id);
}

async function found(part: string, only: "all" | "adapters"): Promise<string[]> {
  const matches = (name: string) => name.toLowerCase().includes(part.toLowerCase());
  if (!may("admin")) return (await visible()).filter(matches).slice(0, SHOWN);
  const adapters = call<Listed<Adapter>>(`/v1/adapters?limit=${SHOWN}&search=${encodeURIComponent(part)}`);
  const names = (await adapters).data.map((adapter) => adapter.name);
  if (only === "adapters") return names;
  const aliases = (await call<Listed<Alias>>("/v1/aliases")).data.map((alias) => alias.name);
  return [...[base.value, ...aliases].filter(matches), ...names].slice(0, SHOWN);
}

interface Choice {
  label: string;
  value: string;
  choose: (name: string) => void;
  only?: "all" | "adapters";
  hidden?: boolean;
}

export function ModelPicker({ label, value, choose, only = "all", hidden = false }: Choice) {
  const id = useId();
  const text = useSignal(value);
  const names = useSignal<string[]>([]);
  const active = useSignal(0);
  const opened = useSignal(false);
  const timer = useRef(0);
  useEffect(() => {
    text.value = value;
  }, [value]);

  const search = (part: string) => {
    clearTimeout(timer.current);
    timer.current = window.setTimeout(async () => {
      names.value = await found(part, only).catch(() => []);
      active.value = 0;
    }, TYPING_MS);
  };
  const show = () => {
    opened.value = true;
    search("");
  };
  const take = (name: string) => {
    choose(name);
    text.value = name;
    opened.value = false;
  };
  const leave = () => {
    opened.value = false;
    if (text.value !== value) take(text.value.trim() || value);
  };
  const pressed = (event: KeyboardEvent) => {
    const number = names.value.length;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!opened.value) show();
      else if (number) active.value = (active.value + (event.key === "ArrowDown" ? 1 : number - 1)) % number;
    } else if (event.key === "Enter" && opened.value) {
      event.preventDefault();
      take(names.value[active.value] ?? text.value);
    } else if (event.key === "Escape") {
      opened.value = false;
      text.value = value;
    }
  };
  const option = (number: number) => `${id}-${number}`;
  return (
    <div class="picker">
      <label for={id} class={hidden ? "sr-only" : ""}>
        {label}
      </label>
      <input
        id={id}
        role="combobox"
        aria-expanded={opened.value}
        aria-controls={`${id}-list`}
        aria-autocomplete="list"
        aria-activedescendant={opened.value && names.value.length ? option(active.value) : undefined}
        autocomplete="off"
        spellcheck={false}
        value={text.value}
        placeholder="choose a model"
        onFocus={(event) => {
          event.currentTarget.select();
          show();
        }}
        onBlur={leave}
        onInput={(event) => {
          text.value = event.currentTarget.value;
          opened.value = true;
          search(text.value);
        }}
        onKeyDown={pressed}
      />
      <ul id={`${id}-list`} role="listbox" aria-label={label} hidden={!opened.value}>
        {names.value.map((name, number) => (
          <li key={name} id={option(number)} role="option" aria-selected={number === active.value} onMouseDown={(event) => event.preventDefault()} onClick={() => take(name)}>
            {name}
            {name === base.value && <span class="muted"> base</span>}
          </li>
        ))}
        {!names.value.length && (
          <li class="muted" role="option" aria-disabled="true" aria-selected="false">
            no model of this name
          </li>
        )}
      </ul>
    </div>
  );
}
