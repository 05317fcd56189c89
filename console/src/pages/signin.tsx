import { useSignal } from "@preact/signals";
import { refusal, signIn } from "../session";
import { Field, Mark, Notice } from "../ui";

export function SignIn() {
  const secret = useSignal("");
  const busy = useSignal(false);
  const submit = async (event: Event) => {
    event.preventDefault();
    busy.value = true;
    await signIn(secret.value.trim());
    busy.value = false;
  };
  return (
    <main class="signin">
      <form onSubmit={submit}>
        <div>
          <Mark size={44} />
          <h1>Loraplex</h1>
          <p class="lead">This server asks for an API key.</p>
        </div>
        {refusal.value && <Notice kind="bad">{refusal.value}</Notice>}
        <Field label="API key" hint="It stays in this tab, and is forgotten when the tab is closed.">
          {(id) => (
            <input id={id} type="password" autocomplete="off" spellcheck={false} required autofocus value={secret.value} placeholder="lpx_…" onInput={(event) => (secret.value = event.currentTarget.value)} />
          )}
        </Field>
        <button type="submit" class="primary" disabled={busy.value || !secret.value.trim()}>
          {busy.value ? "Signing in…" : "Sign in"}
        </button>
      </form>
    </main>
  );
}
