import { useEffect } from "preact/hooks";
import { Adapters } from "./adapters/adapters";
import { Detail } from "./adapters/detail";
import { call, reachable } from "./api";
import { Overview } from "./overview/overview";
import { Keys } from "./pages/keys";
import { Merge } from "./pages/merge";
import { SignIn } from "./pages/signin";
import { Splits } from "./pages/splits";
import { Playground } from "./playground/playground";
import { usePoll } from "./poll";
import { go, link, route } from "./route";
import { base, may, mustSignIn, own, version } from "./session";
import { next, theme } from "./theme";
import type { May } from "./types";
import { Empty, Loading, Mark } from "./ui";

const PAGES: { page: string; title: string; need?: May }[] = [
  { page: "overview", title: "Overview", need: "observe" },
  { page: "adapters", title: "Adapters", need: "admin" },
  { page: "playground", title: "Playground", need: "infer" },
  { page: "splits", title: "Splits", need: "admin" },
  { page: "merge", title: "Merge", need: "operate" },
  { page: "keys", title: "Keys" },
];
const READY_MS = 4000;

export function App() {
  if (mustSignIn.value) return <SignIn />;
  return (
    <div class="shell">
      <a class="skip" href="#main" onClick={skip}>
        Skip to the content
      </a>
      <Side />
      <main id="main" tabIndex={-1}>
        <Standing />
        {own.value === null ? <Opening /> : <Shown />}
      </main>
    </div>
  );
}

function skip(event: MouseEvent): void {
  event.preventDefault();
  document.getElementById("main")?.focus();
}

function Opening() {
  return (
    <div class="page">
      <Loading rows={6} />
    </div>
  );
}

function Shown() {
  const { page, name } = route.value;
  switch (page) {
    case "overview":
      return <Overview />;
    case "adapters":
      return name ? <Detail key={name} name={name} /> : <Adapters />;
    case "playground":
      return <Playground first={name} />;
    case "splits":
      return <Splits />;
    case "merge":
      return <Merge />;
    case "keys":
      return <Keys />;
    default:
      return (
        <Empty title="There is no such page.">
          Go to the <a href={link("overview")}>overview</a>.
        </Empty>
      );
  }
}

function Side() {
  useKeys();
  return (
    <nav class="side" aria-label="Console">
      <a class="brand" href={link("overview")}>
        <Mark size={26} />
        <span>Loraplex</span>
      </a>
      <ul>
        {PAGES.map(({ page, title, need }, number) => (
          <li key={page}>
            <a href={link(page)} aria-current={route.value.page === page ? "page" : undefined} class={own.value && need && !may(need) ? "shut" : ""}>
              {title}
              <kbd aria-hidden="true">{number + 1}</kbd>
            </a>
          </li>
        ))}
      </ul>
      <footer>
        {own.value?.key && (
          <a class="small" href={link("keys")}>
            {own.value.key.name}
          </a>
        )}
        <button type="button" class="quiet" onClick={next} aria-label={`Colours: ${theme.value}`}>
          <i class="half" aria-hidden="true" />
          {theme.value === "auto" ? "Auto" : theme.value === "light" ? "Light" : "Dark"}
        </button>
        <p class="muted small">{version.value ? `Loraplex ${version.value.version}` : "\u00a0"}</p>
      </footer>
    </nav>
  );
}

/** The digits 1 to 6 open a page, `/` searches, unless something is being typed. */
function useKeys(): void {
  useEffect(() => {
    const pressed = (event: KeyboardEvent) => {
      const target = event.target as HTMLElement;
      const typing = target.closest("input, textarea, select, dialog, [contenteditable]");
      if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
      const page = PAGES[Number(event.key) - 1];
      if (page) go(page.page);
      if (event.key === "/") {
        const search = document.querySelector<HTMLInputElement>("input[type=search]");
        if (!search) return;
        event.preventDefault();
        search.focus();
      }
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  }, []);
}

/** Says when the server or its engine is away; the pages keep what they have. */
function Standing() {
  const ready = usePoll((signal) => call<{ status: string }>("/readyz", { signal }), READY_MS);
  const error = ready.error.value;
  if (!reachable.value) {
    return (
      <div class="standing bad" role="alert">
        <b>The server does not answer.</b> What you see may be old; the console tries again by itself.
      </div>
    );
  }
  if (error && error.status === 503) {
    return (
      <div class="standing warn" role="status">
        <b>Not ready.</b> {error.message}
      </div>
    );
  }
  return <span class="sr-only" role="status">{base.value && "The server is ready."}</span>;
}
