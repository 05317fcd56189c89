// The page is in the address after `#`, so that the server has one page and links can be shared.
import { computed, signal } from "@preact/signals";

const hash = signal(location.hash);
addEventListener("hashchange", () => (hash.value = location.hash));

/** The parts of the address: a page, and what it shows. */
export const route = computed(() => {
  const [page = "", ...rest] = hash.value.replace(/^#\/?/, "").split("/");
  return { page: page || "overview", name: rest.map(decodeURIComponent).join("/") };
});

export function link(page: string, name = ""): string {
  return `#/${[page, ...(name ? name.split("/").map(encodeURIComponent) : [])].join("/")}`;
}

export function go(page: string, name = ""): void {
  location.hash = link(page, name);
}
