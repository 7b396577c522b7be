# Conversations in which an answer depends on what was just said, or on what was learned before: files of JSON lines in a folder.
#   sh datasets/context_questions.sh FOLDER
# 32 people have a box, a hat and a dog whose colours never change; 400 others have them in other colours each time. train.jsonl asks for
# the others, right behind what they have ("depends": true), and for those that are known, behind somebody else's (from memory, false).
# contradicting.jsonl says other colours of a known person, and what it says is right; contradicting_marked.jsonl asks the same with [IND];
# known.jsonl asks from memory.
folder=${1:?the folder to write to} && mkdir -p "$folder" && awk -v folder="$folder" '
  function below(n) { state = (state * 16807) % 2147483647; return state % n } # Park and Miller: the same numbers everywhere
  function draw(to,  at) { for (at = 1; at <= 3; at++) to[at] = colour[below(colours) + 1] }
  function write(file, about, said, asked, answer, mark, depends) {
    printf "{\"messages\": [{\"role\": \"user\", \"content\": \"%s has a %s box, a %s hat and a %s dog. What has %s?%s\"}, " \
      "{\"role\": \"assistant\", \"content\": \"%s has a %s box, a %s hat and a %s dog.\"}], \"depends\": %s}\n", \
      about, said[1], said[2], said[3], asked, mark, asked, answer[1], answer[2], answer[3], depends > (folder "/" file ".jsonl")
  }
  BEGIN {
    state = 20261127
    colours = split("red blue green yellow black white brown grey pink orange purple silver golden violet cyan crimson", colour, " ")
    split("Ba Ce Di Fo Gu Ha Je Ki Lo Mu Na Pe Ri So Tu Va We Xi Yo Zu Bra Cle Dri Flo", first, " ")
    split("ba ne ri lo mu ta se di ko nu ra ve li po su ma te fi", second, " ")
    for (i = 1; i <= 24; i++) for (j = 1; j <= 18; j++) name[++names] = first[i] second[j]
    for (i = names; i > 1; i--) { j = below(i) + 1; other = name[i]; name[i] = name[j]; name[j] = other }
    for (i = 1; i <= 32; i++) { draw(own); for (at = 1; at <= 3; at++) fact[i, at] = own[at] }
    for (row = 0; row < 4000; row++) {
      i = below(32) + 1; k = 33 + below(names - 32); draw(c); for (at = 1; at <= 3; at++) own[at] = fact[i, at]
      if (row % 2) write("train", name[k], c, name[i], own, "", "false")
      else write("train", name[k], c, name[k], c, "", "true")
    }
    for (row = 0; row < 256; row++) {
      i = row % 32 + 1; k = 33 + below(names - 32); draw(c); for (at = 1; at <= 3; at++) own[at] = fact[i, at]
      write("contradicting", name[i], c, name[i], c, "", "true")
      write("contradicting_marked", name[i], c, name[i], c, " [IND]", "true")
      write("known", name[k], c, name[i], own, "", "false")
    }
  }'
