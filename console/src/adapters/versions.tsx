import { useSignal } from "@preact/signals";
import { ApiError, adapterPath, call } from "../api";
import { ago, moment, short } from "../format";
import type { AdapterVersion } from "../types";
import { Failure } from "../ui";
import { Difference } from "./report";

/** The history of a name, newest first. Any two may be compared; a stored one may become the current one again. */
export function Versions({ name, versions, refresh }: { name: string; versions: AdapterVersion[]; refresh: () => void }) {
  const failure = useSignal<ApiError | null>(null);
  const compared = useSignal<string | null>(null);
  const current = versions.find((version) => version.current);
  const other = versions.find((version) => version.version === compared.value && !version.current);
  const rollBack = async (version: string) => {
    failure.value = null;
    try {
      await call(adapterPath(name, "rollback"), { method: "POST", body: { version } });
    } catch (error) {
      failure.value = error as ApiError;
    }
    refresh();
  };
  const ordered = current && other ? [current, other].sort((a, b) => a.created - b.created) : null;
  return (
    <>
      <Failure error={failure.value} />
      <ol class="versions">
        {versions.map((version) => (
          <li key={version.version} class={version.current ? "current" : ""}>
            <div>
              <code>{short(version.version)}</code>
              {version.current && <span class="tag accent">current</span>}
              {!version.report && <span class="tag">not stored</span>}
              <span class="muted" title={moment(version.created)}>
                {ago(version.created)}
              </span>
            </div>
            {!version.current && (
              <div class="row tight">
                <button type="button" class="quiet" aria-pressed={compared.value === version.version} onClick={() => (compared.value = compared.value === version.version ? null : version.version)}>
                  Compare
                </button>
                {version.report && (
                  <button type="button" class="quiet" onClick={() => rollBack(version.version)}>
                    Roll back to it
                  </button>
                )}
              </div>
            )}
          </li>
        ))}
      </ol>
      {ordered && <Difference older={ordered[0]!} newer={ordered[1]!} />}
      {versions.length === 1 && <p class="hint">A new version appears here; requests that run keep the one they began with.</p>}
    </>
  );
}
