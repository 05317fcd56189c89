// What a JavaScript client is asked, and how its responses are reported: one line of JSON for each feature.
import { appendFileSync, readFileSync, writeFileSync } from "node:fs";

export const { LORAPLEX_URL: URL, LORAPLEX_MODEL: MODEL } = process.env;
export const KEY = "none";
export const TASK = JSON.parse(readFileSync(new globalThis.URL("task.json", import.meta.url)));
export const { max_tokens: MAX_TOKENS, weather: WEATHER, person: PERSON, texts: TEXTS } = TASK;
export const JSON_TOKENS = PERSON.max_tokens;

export async function report(features, absent = {}) {
  const file = process.argv[2];
  writeFileSync(file, "");
  const write = (line) => appendFileSync(file, `${JSON.stringify(line)}\n`);
  for (const [feature, reason] of Object.entries(absent)) write({ feature, absent: reason });
  for (const [feature, run] of Object.entries(features)) {
    try {
      write({ feature, value: await run() });
    } catch (error) {
      console.error(error);
      write({ feature, error: `${error.name}: ${error.message}` });
    }
  }
}
