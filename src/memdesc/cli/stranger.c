/* A program that knows nothing of memdesc: it has one buffer by malloc, and one by Listing 2. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

size_t		bigBufferLen;
uint8_t		*bigBuffer;

int main(void)
{
    char *small;

    bigBufferLen = 54321;

    // Use anonymous mmap to ensure we get a single VM object.
    bigBuffer = (uint8_t *) mmap(NULL, bigBufferLen, PROT_READ | PROT_WRITE, MAP_ANON | MAP_SHARED, -1, 0);
    if (bigBuffer == MAP_FAILED) {
        perror("mmap() call error:");
        return 1;
    }
    small = malloc(bigBufferLen);
    if (small == NULL)
        return 1;
    strcpy((char *) bigBuffer, "stored by the stranger");
    strcpy(small, "private to the stranger");
    printf("%p %p\n", (void *) bigBuffer, (void *) small);
    fflush(stdout);

    // At each line of input: say what the big buffer holds now.
    while (getchar() != EOF) {
        printf("%.60s\n", (char *) bigBuffer);
        fflush(stdout);
    }
    return 0;
}
