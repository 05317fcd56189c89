import { useSignal } from "@preact/signals";
import type { ComponentChild } from "preact";
import { useRef } from "preact/hooks";
import { ApiError, upload } from "../api";
import { bytes } from "../format";
import type { Adapter, Report } from "../types";
import { Dialog, Failure, Field, Notice, Switch } from "../ui";
import { Facts } from "./report";

/** The files that an adapter may have; the first two are needed. */
const NEEDED = ["adapter_config.json", "adapter_model.safetensors"];
const OPTIONAL = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"];

export interface Chosen {
  name: string;
  files: Map<string, File>;
}

function chosenFrom(name: string, files: File[]): Chosen {
  const known = files.filter((file) => [...NEEDED, ...OPTIONAL].includes(file.name));
  return { name: name.replace(/[^\w.:-]+/g, "-"), files: new Map(known.map((file) => [file.name, file])) };
}

/** Opens the browser's own dialog. */
export function chooseFiles(): Promise<Chosen | null> {
  return new Promise((resolve) => {
    const input = Object.assign(document.createElement("input"), { type: "file", multiple: true });
    input.onchange = () => resolve(input.files?.length ? chosenFrom("", [...input.files]) : null);
    input.oncancel = () => resolve(null);
    input.click();
  });
}

/** The files of a drop, of which a folder is read one level deep. */
export async function dropped(transfer: DataTransfer): Promise<Chosen> {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.());
  const folder = entries.find((entry) => entry?.isDirectory) as FileSystemDirectoryEntry | undefined;
  if (!folder) return chosenFrom("", [...transfer.files]);
  const reader = folder.createReader();
  const inside = await new Promise<FileSystemEntry[]>((resolve, reject) => reader.readEntries(resolve, reject));
  const files = inside.filter((entry) => entry.isFile) as FileSystemFileEntry[];
  return chosenFrom(folder.name, await Promise.all(files.map((file) => new Promise<File>((resolve, reject) => file.file(resolve, reject)))));
}

interface Published {
  name: string;
  version: string;
  rank: number;
  report: Report;
  dry_run?: boolean;
}

export function Upload({ chosen, into, close, done }: { chosen: Chosen; into?: string; close: () => void; done: (name: string) => void }) {
  const name = useSignal(into ?? chosen.name);
  const replace = useSignal(into !== undefined);
  const pinned = useSignal(false);
  const inFlight = useSignal("finish");
  const sent = useSignal<number | null>(null);
  const failure = useSignal<ApiError | null>(null);
  const report = useSignal<Published | null>(null);
  const stop = useRef(new AbortController());
  const missing = NEEDED.filter((file) => !chosen.files.has(file));
  const size = [...chosen.files.values()].reduce((sum, file) => sum + file.size, 0);

  const send = async (dryRun: boolean) => {
    failure.value = report.value = null;
    sent.value = 0;
    stop.current = new AbortController();
    const form = new FormData();
    form.set("name", name.value.trim());
    form.set("replace", String(replace.value));
    form.set("pinned", String(pinned.value));
    if (replace.value) form.set("in_flight", inFlight.value);
    for (const [file, content] of chosen.files) form.set(file, content);
    try {
      const answer = await upload<Published & Partial<Adapter>>(`/v1/adapters?dry_run=${dryRun}`, form, (part) => (sent.value = part), stop.current.signal);
      report.value = answer;
    } catch (error) {
      failure.value = error as ApiError;
    }
    sent.value = null;
  };
  const cancel = () => {
    stop.current.abort();
    close();
  };
  const published = report.value !== null && !report.value.dry_run;
  return (
    <Dialog title={into ? `New version of ${into}` : "Publish an adapter"} close={cancel}>
      {missing.length > 0 ? (
        <Notice kind="bad">
          There is no {missing.map((file) => <code key={file}>{file}</code>).reduce((all: ComponentChild[], file, i) => [...all, i ? " and no " : "", file], [])}. Choose the files that PEFT's <code>save_pretrained</code> wrote.
        </Notice>
      ) : (
        <form
          onSubmit={(event) => {
            event.preventDefault();
            if (published) done(report.value!.name);
            else void send(false);
          }}
        >
          <ul class="files">
            {[...chosen.files].map(([file, content]) => (
              <li key={file}>
                <code>{file}</code>
                <span class="muted">{bytes(content.size)}</span>
              </li>
            ))}
          </ul>
          {!into && (
            <Field label="Name" hint="Requests name it as their model.">
              {(id) => <input id={id} required autofocus spellcheck={false} maxLength={256} value={name.value} disabled={published} onInput={(event) => (name.value = event.currentTarget.value)} />}
            </Field>
          )}
          <div class="row">
            {!into && <Switch on={replace.value} label="replace the adapter of this name" change={(on) => (replace.value = on)} disabled={published} />}
            <Switch on={pinned.value} label="pin to the device" change={(on) => (pinned.value = on)} disabled={published} />
          </div>
          {replace.value && (
            <Field label="Running requests">
              {(id) => (
                <select id={id} value={inFlight.value} disabled={published} onChange={(event) => (inFlight.value = event.currentTarget.value)}>
                  <option value="finish">finish on the version they began with</option>
                  <option value="switch">go on with the new version</option>
                  <option value="abort">end at once</option>
                </select>
              )}
            </Field>
          )}
          {sent.value !== null && <Progress part={sent.value} size={size} />}
          <Failure error={failure.value} />
          {report.value && (
            <Notice kind="good">
              <strong>{published ? "Published." : "It would be published as it is."}</strong>
              <Facts report={report.value.report} rank={report.value.rank} />
            </Notice>
          )}
          <div class="actions">
            <button type="button" class="quiet" onClick={cancel}>
              {published ? "Close" : "Cancel"}
            </button>
            {!published && (
              <button type="button" disabled={sent.value !== null || !name.value.trim()} onClick={() => send(true)}>
                Only check
              </button>
            )}
            <button type="submit" class="primary" disabled={sent.value !== null || !name.value.trim()}>
              {published ? "Open" : "Publish"}
            </button>
          </div>
        </form>
      )}
    </Dialog>
  );
}

function Progress({ part, size }: { part: number; size: number }) {
  const text = part < 1 ? `${bytes(part * size)} of ${bytes(size)} sent` : "Sent. The server checks every tensor and runs the self-test.";
  return (
    <div class="progress" role="status">
      <progress max={1} value={part < 1 ? part : undefined} aria-label="Upload" />
      <span class="muted">{text}</span>
    </div>
  );
}
