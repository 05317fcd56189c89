// The server's own routes: JSON, streams of events and lines, and uploads with progress.
import { signal } from "@preact/signals";

export interface Problem {
  where: string;
  found: string;
  expected: string;
  code: string;
}

/** An error response, or (status 0) no response at all. */
export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly code: string | null = null,
    readonly problems: Problem[] = [],
  ) {
    super(message);
  }
}

const STORED = "loraplex-key";

/** The API key of this tab. It is kept in sessionStorage alone, which ends with the tab. */
export const key = signal(sessionStorage.getItem(STORED) ?? "");
/** Whether the last request reached the server. */
export const reachable = signal(true);
/** Counts refusals of the key (401): the session asks for another one. */
export const refusals = signal(0);

export function keepKey(secret: string): void {
  if (secret) sessionStorage.setItem(STORED, secret);
  else sessionStorage.removeItem(STORED);
  key.value = secret;
}

function headers(json: boolean): Record<string, string> {
  return {
    ...(key.value ? { authorization: `Bearer ${key.value}` } : {}),
    ...(json ? { "content-type": "application/json" } : {}),
  };
}

export interface Request {
  method?: string;
  body?: unknown;
  signal?: AbortSignal;
}

export async function open(path: string, { method = "GET", body, signal }: Request = {}): Promise<Response> {
  let response: Response;
  try {
    const json = body !== undefined;
    response = await fetch(path, {
      method,
      headers: headers(json),
      body: json ? JSON.stringify(body) : undefined,
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    reachable.value = false;
    throw new ApiError(0, "The server does not answer.");
  }
  reachable.value = true;
  if (!response.ok) throw errorOf(response.status, await response.text());
  return response;
}

export async function call<T>(path: string, request: Request = {}): Promise<T> {
  return (await (await open(path, request)).json()) as T;
}

export function errorOf(status: number, text: string): ApiError {
  if (status === 401) refusals.value++;
  try {
    const { error } = JSON.parse(text);
    return new ApiError(status, error.message, error.code, error.problems ?? []);
  } catch {
    return new ApiError(status, `The server answered with status ${status}.`);
  }
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** Names may have slashes, which belong to the path. */
export function adapterPath(name: string, ...rest: string[]): string {
  return ["/v1/adapters", name.split("/").map(encodeURIComponent).join("/"), ...rest].join("/");
}

export async function* linesOf(response: Response): AsyncGenerator<string> {
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop()!;
      yield* lines;
    }
    if (rest) yield rest;
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** The JSON of each frame of a stream of events, until [DONE]. An error frame is thrown. */
export async function* eventsOf<T>(response: Response): AsyncGenerator<T> {
  for await (const line of linesOf(response)) {
    if (!line.startsWith("data: ")) continue;
    const data = line.slice(6);
    if (data === "[DONE]") return;
    const event = JSON.parse(data);
    if (event.error) throw new ApiError(200, event.error.message, event.error.code);
    yield event as T;
  }
  throw new ApiError(0, "The stream ended before it was complete.");
}

/** Sends a form. XMLHttpRequest, because fetch cannot tell how much has been sent. */
export function upload<T>(path: string, form: FormData, sent: (part: number) => void, stop: AbortSignal): Promise<T> {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", path);
    for (const [name, value] of Object.entries(headers(false))) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => sent(event.lengthComputable ? event.loaded / event.total : 0);
    request.onload = () => {
      if (request.status < 300) resolve(JSON.parse(request.responseText));
      else reject(errorOf(request.status, request.responseText));
    };
    request.onerror = () => reject(new ApiError(0, "The server ended the connection or does not answer."));
    request.onabort = () => reject(new ApiError(0, "The upload was cancelled."));
    stop.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}
