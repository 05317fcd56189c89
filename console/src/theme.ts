// Light, dark, or as the system has it. `colors` follows for what is drawn on a canvas.
import { effect, signal } from "@preact/signals";

export type Theme = "auto" | "light" | "dark";
const STORED = "loraplex-theme";
const THEMES: Theme[] = ["auto", "light", "dark"];
const system = matchMedia("(prefers-color-scheme: dark)");

const stored = localStorage.getItem(STORED) as Theme | null;
export const theme = signal<Theme>(stored && THEMES.includes(stored) ? stored : "auto");
/** Counts changes of the colours in force. */
export const repaints = signal(0);

effect(() => {
  if (theme.value === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme.value;
  localStorage.setItem(STORED, theme.value);
  repaints.value = repaints.peek() + 1;
});
system.addEventListener("change", () => repaints.value++);

export function next(): void {
  theme.value = THEMES[(THEMES.indexOf(theme.value) + 1) % THEMES.length]!;
}

const probe = document.documentElement.appendChild(document.createElement("i"));
probe.hidden = true;
let resolved = new Map<string, string>();
effect(() => {
  if (repaints.value) resolved = new Map();
});

/** The colour in force under a name of the style sheet; a canvas does not know those names. */
export function color(name: string): string {
  let found = resolved.get(name);
  if (found === undefined) {
    probe.style.color = `var(--${name})`;
    resolved.set(name, (found = getComputedStyle(probe).color));
  }
  return found;
}
